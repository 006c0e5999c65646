"""The class that stands in front of a stock module's class and runs it fused."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor, nn

from .guard import call_reason


class FusedModule:
    """Mixin in front of a stock `nn.Module` class: the same children, parameters and buffers, a fused forward.

    The stock module keeps its `__init__` and its state; only its class is swapped. So state_dicts, optimizers, hooks on
    the module, `isinstance` and its parents are as before, and swapping back restores the stock module entirely.
    """

    unit: str
    """Name of the function in `fastres.functional`."""

    stock_class: type[nn.Module]
    """What `fastres.revert` swaps back to; each fused class sets its own."""

    settings: ClassVar[tuple[str, ...]]
    """Instance attributes that `fastres.convert` sets; they survive deepcopy and pickle."""

    def __reduce_ex__(self, protocol: int):
        reduced = super().__reduce_ex__(max(protocol, 2))
        if type(self) not in _made:
            return reduced
        # A class made at run time is not importable by name: rebuild it from the two that are.
        return _new, _made[type(self)], *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        return _stock_copy(self)


class FusedSlices:
    """Mixin in front of nn.Sequential: a slice, which is made by calling the class, has the settings too."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if isinstance(index, slice):
            for name in self.settings:
                if name in self.__dict__:
                    setattr(found, name, self.__dict__[name])
        return found


class FusedUnit(FusedModule):
    """A fused module whose children are layers.

    A mixin for one unit sets `unit` and defines `fused_reason` and `fused_forward`.
    """

    settings = ("backend",)

    backend: str = "auto"
    """One of `fastres.backends.CHOICES`."""

    def fused_reason(self) -> str | None:
        """Why the children have to run one by one as they are now, or None."""
        raise NotImplementedError

    def separate_reason(self) -> str | None:
        """Which children run as modules beside the fused rest, and why, or None."""
        return None

    def form(self, dtype: torch.dtype, device: torch.device) -> str:
        """What of the unit is stored and what is Gram-folded for activations like these, and why, or how many it runs;
        "" where there is nothing to tell. Raises RuntimeError where its backend cannot run there.
        """
        return ""

    def fused_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if call_reason(x) is None and self.fused_reason() is None:
            return self.fused_forward(x)
        return super().forward(x)


_made: dict[type, tuple[type[FusedModule], type[nn.Module]]] = {}


@functools.cache
def fused_class(mixin: type[FusedModule], stock_class: type[nn.Module]) -> type[FusedModule]:
    """The one class that is `mixin` in front of `stock_class`."""
    namespace = {"stock_class": stock_class, "__module__": mixin.__module__, "__doc__": stock_class.__doc__}
    made = type(f"Fused{stock_class.__name__}", (mixin, stock_class), namespace)
    _made[made] = mixin, stock_class
    return made


def _new(mixin: type[FusedModule], stock_class: type[nn.Module]) -> FusedModule:
    cls = fused_class(mixin, stock_class)
    return cls.__new__(cls)


def _stock_copy(module: nn.Module) -> nn.Module:
    """The module tree with stock classes; parameters, buffers and hooks are shared.

    torch.jit.script compiles by class, which it cannot do with a mixin in front, and it writes what
    `__prepare_scriptable__` returns into the `_modules` of the parent: a copy keeps the caller's model fused.
    """
    if not any(isinstance(child, FusedModule) for child in module.modules()):
        return module
    cls = module.stock_class if isinstance(module, FusedModule) else type(module)
    result = cls.__new__(cls)
    result.__dict__.update(module.__dict__)
    result._modules = {name: child and _stock_copy(child) for name, child in module._modules.items()}
    return result
