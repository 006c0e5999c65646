"""Convolution, batch norm and ReLU where they follow each other in an nn.Sequential, as in VGG and many a stem."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.text import listed

from .conv_bn_relu import layers_reason, run_layers
from .fused import FusedSlices, FusedUnit
from .guard import call_reason

_REASONS_SHOWN = 3


def triples(module: nn.Module) -> list[list[str]]:
    """Names of the children that are a conv, its batch norm and a ReLU, by their classes and whatever else they are."""
    return [names for names in _parts(module) if len(names) == 3]


def _parts(module: nn.Module) -> list[list[str]]:
    """Names of all children in order, those of a triple together."""
    modules = module.__dict__["_modules"]
    names, children = list(modules), list(modules.values())
    parts, i = [], 0
    while i < len(names):
        count = 3 if _is_triple(children[i : i + 3]) else 1
        parts.append(names[i : i + count])
        i += count
    return parts


def _is_triple(children: list[nn.Module | None]) -> bool:
    return (
        len(children) == 3
        and isinstance(children[0], nn.Conv2d)
        and isinstance(children[1], nn.modules.batchnorm._BatchNorm)
        and isinstance(children[2], nn.ReLU)
    )


def _refused(module: nn.Module) -> str | None:
    """Which triples run as modules, and why."""
    reasons = {f"{names[0]}-{names[2]}": layers_reason(module, names) for names in triples(module)}
    phrases = [f"{name} run as modules: {reason}" for name, reason in reasons.items() if reason is not None]
    return listed(phrases, _REASONS_SHOWN) or None


class FusedSequential(FusedSlices, FusedUnit):
    """Runs each conv, batch norm and ReLU that follow each other through `fastres.functional.conv_bn_relu`, where they
    can be fused, and calls the other children as modules.

    What comes out of a fused triple is in channels_last memory, as of every unit: `x.view(n, -1)` on it raises, and
    `x.flatten(1)` does what was meant.

    No `__init__` of its own: slices of an nn.Sequential are made by calling its class with the children.
    """

    unit = "conv_bn_relu"

    def fused_reason(self) -> str | None:
        found = triples(self)
        for names in found:
            if layers_reason(self, names) is None:
                return None
        if not found:
            return "no conv, batch norm and ReLU follow each other"
        return _refused(self)

    def separate_reason(self) -> str | None:
        return _refused(self)

    def form(self, dtype: torch.dtype, device: torch.device) -> str:
        found = triples(self)
        fused = sum(layers_reason(self, names) is None for names in found)
        return f"{fused}{'' if fused == len(found) else f' of {len(found)}'} conv + BN + ReLU"

    def forward(self, input: Tensor) -> Tensor:  # by nn.Sequential's name
        return super().forward(input)

    def fused_forward(self, x: Tensor) -> Tensor:
        modules = self.__dict__["_modules"]
        for names in _parts(self):
            # The input is asked about each time: children of other classes may return anything.
            if len(names) == 3 and layers_reason(self, names) is None and call_reason(x) is None:
                x = run_layers(modules[names[0]], modules[names[1]], x, self.backend)
            else:
                for name in names:
                    x = modules[name](x)
        return x
