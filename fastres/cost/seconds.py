"""How long a kernel call should take on a GPU, by a model: what `fastres.plan` chooses by where nothing was measured.

A call is one pass of bytes and products, or several; each takes what moving its bytes takes or computing its products,
whichever is longer, and a launch besides. The rates are fractions of the datasheet's (docs/arithmetic.md, "What the
plan folds, and chooses"): assumed, not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from fastres import parts, plan
from fastres.kernels import reference
from fastres.parts import Part

from . import kernels
from .counting import ONE_PASS, contract_bytes, counting
from .traffic import Traffic, tensors

LAUNCH = 3e-6
"""Seconds between the starts of two short kernels."""

MEMORY = 0.75
"""Of the datasheet's bandwidth, what a kernel moves by."""

PRODUCTS = {"triton": 0.4, "library": 0.6}
"""Of the datasheet's dense rate, what matrix products run at, by namespace; forms of the library run at its rate."""


@dataclass(frozen=True)
class Call:
    """A call of a kernel: its name, its arguments on the meta device, and the device that it is for."""

    kernel: str
    args: tuple
    kwargs: dict[str, object]
    device: torch.device

    @staticmethod
    def of(kernel: str, args: tuple, kwargs: dict[str, object]) -> Call:
        device = tensors((args, kwargs))[0].device
        # Nothing of this is the business of modes that may be active around a training step.
        with _disable_current_modes():
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        return Call(kernel, args, kwargs, device)

    @property
    def arguments(self) -> kernels.Arguments:
        """By name, defaults included."""
        return kernels.bind(self.kernel, self.args, self.kwargs)

    @property
    def label(self) -> str:
        """The kernel, the dtype of its first tensor, and every argument: shapes of tensors, values of others."""
        arguments = self.arguments
        dtype = str(tensors(arguments)[0].dtype).removeprefix("torch.")
        shown = (f"{name} {_text(value)}" for name, value in arguments.items() if value is not None)
        return f"{self.kernel} {dtype}: {', '.join(shown)}"

    def modelled(self, namespace: str, launcher: Callable, part: Part | None = None) -> float:
        """Seconds by the launcher of a namespace or of a form of one; on `part` or else on the call's device."""
        if part is None:
            part = parts.of_gpu(torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None)
        dtype = tensors((self.args, self.kwargs))[0].dtype
        with _disable_current_modes():
            if namespace in ONE_PASS:
                result, arguments = getattr(reference, self.kernel)(*self.args, **self.kwargs), self.arguments
                work = contract_bytes(self.kernel, arguments, result), kernels.flops(self.kernel, arguments, result)
                passes = [work] + [(0, 0)] * (self.kernel.endswith(("wgrad", "bwd")) or self.kernel == "gram")
            else:
                with Traffic(part) as traffic:
                    counted = plan.with_passes(launcher, lambda passes: counting(passes, traffic))
                    counted(*self.args, **self.kwargs)
                passes = [(step.bytes, step.flops) for step in traffic.steps]
        memory, products = MEMORY * part.bandwidth, PRODUCTS.get(namespace, PRODUCTS["library"]) * part.rate(dtype)
        return sum(LAUNCH + max(moved / memory, flops / products) for moved, flops in passes)


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return _text(value.shape) or "scalar"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
