"""Swap the classes of a model's modules for their fused ones, and back.

Named `conversion` because a module `fastres.convert` would take the place of the function `fastres.convert`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from . import backends
from .nn import blocks, conv_bn_relu, projection, sequential, stage, stem
from .nn.fused import FusedModule, fused_class
from .nn.stage import GRANULARITIES
from .text import listed

# The second is where torchvision's ResNet keeps its forward, the third is how an nn.Sequential's gets at the children.
_FORWARD_METHODS = ("forward", "_forward_impl", "__iter__")
_NAMED_IN_MESSAGES = 5
NOTHING_KNOWN = (
    "no block or stem of a class that fastres knows, no nn.Sequential with conv, batch norm and ReLU in a row"
)


class Unit(NamedTuple):
    """A module that is, or looks like, something that can be fused.

    fused: the class to swap to, or that the module has already; None where there is none. reason: why the module runs
    as stock even in that class, or None. A stage, whose blocks are units themselves, has always a class and no reason.
    """

    path: str
    module: nn.Module
    name: str
    fused: type[FusedModule] | None
    reason: str | None

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({self.name}): {self.reason}"


def convert(
    model: nn.Module,
    *,
    backend: str = "auto",
    granularity: str = "auto",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
) -> nn.Module:
    """Fuse the residual blocks of a model, in place, the stages that they make, and other convolutions that have batch
    norm and ReLU behind them.

    Known are the blocks and the stem of torchvision's ResNets (also in a subclass that keeps their forward), those of
    `fastres.nn` and `fastres.models`, and every nn.Sequential in which a conv, a batch norm and a ReLU follow each
    other, as in VGG, unless it holds residual blocks besides. Each keeps its children, parameters and buffers:
    state_dicts, the references of optimizers and hooks on the block stay; only the class changes. A block, or such
    three layers, that have at some call a child that fusion cannot honour (a hook, a parametrization, another norm) run
    as modules one by one; `fastres.explain` says so. An nn.Sequential of two or more blocks becomes a
    `fastres.nn.Stage`, which chains those that can be.

    Converting again is harmless and sets `backend` and `granularity` anew. Convert before torch.compile and before
    fully_shard.

    Args:
        model: any module that holds such blocks, or is one.
        backend: one of `fastres.backends.CHOICES`, stored in each converted unit but stages as its attribute `backend`.
        granularity: "block" for one fused function for each block, "stage" for one for each chain of blocks, "auto"
            for one of both, see `fastres.nn.Stage`; stored in each stage as its attribute `granularity`. With "block"
            an nn.Sequential of blocks stays what it is.
        filter_fn: called with each unit and its path in the model; where it returns False the module stays as it is. A
            block that stays so is called as a module by its stage.
        strict: raise ValueError, and change nothing, unless everything that was found can be fused.

    Returns:
        The same model. Warns, once, when something that looks like a block or a stem, or a conv, batch norm and ReLU in
        a row, will run as stock modules, or when there is nothing to fuse.

    Raises:
        ValueError: unknown `backend` or `granularity`; `strict`; a model already compiled or sharded.
        RuntimeError: `backend` cannot run on this machine.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is not known; use one of {', '.join(map(repr, GRANULARITIES))}")
    backends.require(backend)
    _refuse_compiled(model, "convert")
    units = [unit for unit in find_units(model) if filter_fn is None or filter_fn(unit.module, unit.path)]
    for unit in units:
        if unit.fused is None and _is_sharded(unit.module):
            raise ValueError(f"convert: {unit}")
    with_layers = [unit for unit in units if unit.name != "stage"]
    left = [unit for unit in map(_with_refused_layers, with_layers) if unit.reason is not None]
    message = None
    if not with_layers:
        message = f"{type(model).__name__} has nothing to fuse: {NOTHING_KNOWN}"
    elif left:
        wholly = "" if all(unit in with_layers for unit in left) else ", some of them in part"
        message = f"{len(left)} of {len(with_layers)} units run as stock modules{wholly}: {_listed(left)}"
    if strict and message is not None:
        raise ValueError(f"convert: {message}")
    settings = {"backend": backend, "granularity": granularity}
    for unit in units:
        keeps_class = granularity == "block" and unit.name == "stage" and type(unit.module) is nn.Sequential
        if unit.fused is not None and not keeps_class:
            unit.module.__class__ = unit.fused
            for name in unit.fused.settings:
                setattr(unit.module, name, settings[name])
    if message is not None:
        warnings.warn(f"fastres.convert: {message}", stacklevel=2)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give every fused module of a model its stock class back, in place; returns the same model.

    Modules built from `fastres.nn` and `fastres.models` get the stock class that each names as `stock_class`. Raises
    ValueError, and changes nothing, when a fused class was subclassed (fully_shard does that) or the model is compiled.
    """
    _refuse_compiled(model, "revert")
    fused = [(path, module) for path, module in model.named_modules() if isinstance(module, FusedModule)]
    for path, module in fused:
        if "stock_class" not in vars(type(module)):
            why = "revert before fully_shard" if _is_sharded(module) else "a subclass has no stock class to go back to"
            raise ValueError(f"revert: {path or 'the model'} is {type(module).__name__}: {why}")
    for _, module in fused:
        for name in type(module).settings:
            module.__dict__.pop(name, None)
        module.__class__ = type(module).stock_class
    return model


def find_units(model: nn.Module) -> list[Unit]:
    """Everything in the model, itself included, that is or looks like a block or a stem, and every stage, in the
    model's order.
    """
    known = _known_classes()
    units = (_unit(path, module, known) for path, module in model.named_modules())
    return [unit for unit in units if unit is not None]


def _unit(path: str, module: nn.Module, known: dict[type[nn.Module], type[FusedModule]]) -> Unit | None:
    cls = type(module)
    chained = _stage(path, module, known) if isinstance(module, stage.FusedStage) or cls is nn.Sequential else None
    if chained is not None or isinstance(module, stage.FusedStage):
        return chained
    fused, reason = None, None
    if isinstance(module, nn.Sequential) and _has_layers(module, known):
        known = known | {nn.Sequential: fused_class(sequential.FusedSequential, nn.Sequential)}
    base = next((base for base in cls.__mro__ if base in known), None)
    if isinstance(module, FusedModule):
        fused = cls
    elif base is None:
        name = _resembles(module)
        if name is None:
            return None
        return Unit(path, module, name, None, f"{_qualified(cls)} is not a class that fastres knows")
    elif _is_sharded(module):
        reason = "it is sharded already; convert the model before fully_shard"
    elif any(getattr(cls, method, None) is not getattr(base, method, None) for method in _FORWARD_METHODS):
        reason = f"{_qualified(cls)} has a forward of its own"
    elif isinstance(module, nn.Sequential) and (name := _taken(module, sequential.FusedSequential)) is not None:
        reason = f"it uses the name {name!r}, which fastres needs for itself"
    else:
        fused = known[base] if cls is base else fused_class(known[base].__bases__[0], cls)
    if "forward" in module.__dict__:
        fused, reason = None, "its forward was replaced on the instance"
    if fused is not None:
        reason = fused.fused_reason(module)
    return Unit(path, module, (fused or known[base]).unit, fused, reason)


def _stage(path: str, module: nn.Sequential, known: dict[type[nn.Module], type[FusedModule]]) -> Unit | None:
    """A stage has two or more children and is fused already, or an nn.Sequential of nothing but blocks with a class to
    swap to.
    """

    def is_block(child: nn.Module | None) -> bool:
        if child is None:
            return False
        unit = _unit("", child, known)
        return unit is not None and unit.fused is not None and issubclass(unit.fused, blocks.FusedBlock)

    if len(module) < 2:
        return None
    if isinstance(module, FusedModule):
        return Unit(path, module, "stage", type(module), None)
    if "forward" in module.__dict__ or _taken(module, stage.FusedStage) or not all(map(is_block, module)):
        return None
    return Unit(path, module, "stage", stage.Stage, None)


def _with_refused_layers(unit: Unit) -> Unit:
    """The unit; of an nn.Sequential of which some layers will run as modules, with the reason for that."""
    if unit.fused is None or not issubclass(unit.fused, sequential.FusedSequential) or unit.reason is not None:
        return unit
    return unit._replace(reason=unit.fused.separate_reason(unit.module))


def _taken(module: nn.Sequential, mixin: type[FusedModule]) -> str | None:
    """A name that both an nn.Sequential which is not fused, by a child or an attribute, and the mixin use."""
    if isinstance(module, FusedModule):
        return None
    names = [name for name in module._modules if hasattr(mixin, name) and not hasattr(nn.Sequential, name)]
    names += [name for name in mixin.settings if name in module.__dict__ or hasattr(type(module), name)]
    return names[0] if names else None


def _has_layers(module: nn.Sequential, known: dict[type[nn.Module], type[FusedModule]]) -> bool:
    """Whether a conv, a batch norm and a ReLU follow each other in it, beside which are no residual blocks."""
    if isinstance(module, sequential.FusedSequential):
        return True
    if not sequential.triples(module):
        return False
    units = (_unit("", child, known) for child in module.children())
    return not any(unit is not None and unit.name in ("basic_block", "bottleneck") for unit in units)


def _known_classes() -> dict[type[nn.Module], type[FusedModule]]:
    """Each stock class with its fused class. torchvision's are known once the program has imported them."""
    known: dict[type[nn.Module], type[FusedModule]] = {
        fused.stock_class: fused
        for fused in (
            blocks.BasicBlock,
            blocks.Bottleneck,
            conv_bn_relu.ConvBNReLU2d,
            projection.Projection,
            stem.Stem,
        )
    }
    models = sys.modules.get("fastres.models.resnet")
    if models is not None:
        known[models.StockResNet] = models.ResNet
    torchvision = sys.modules.get("torchvision.models.resnet")
    if torchvision is not None:
        for name, mixin in (
            ("BasicBlock", blocks.FusedBasicBlock),
            ("Bottleneck", blocks.FusedBottleneck),
            ("ResNet", stem.FusedResNet),
        ):
            stock_class = getattr(torchvision, name)
            known[stock_class] = fused_class(mixin, stock_class)
    return known


def _resembles(module: nn.Module) -> str | None:
    """The unit that a module of an unknown class looks like, by the names of its children."""
    names = module._modules.keys()
    if {"conv1", "bn1", "conv2", "bn2"} <= names:
        return "bottleneck" if "conv3" in names else "basic_block"
    if {"conv1", "bn1", "maxpool"} <= names:
        return "stem"
    return None


def _refuse_compiled(model: nn.Module, function: str) -> None:
    # torch 2.11 keeps running the graph it has compiled, whatever happens to the classes of the modules.
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        raise ValueError(f"{function}: the model is compiled already; call {function} first, then torch.compile")


def _is_sharded(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _listed(units: list[Unit]) -> str:
    return f"{listed(list(map(str, units)), _NAMED_IN_MESSAGES)} (fastres.explain(model) lists every unit)"


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
