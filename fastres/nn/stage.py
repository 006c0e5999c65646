"""A stage of a ResNet: residual blocks one behind the other, chained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, distributed, nn

from fastres import functional

from .blocks import FusedBasicBlock, FusedBlock, FusedBottleneck
from .fused import FusedModule, FusedSlices, FusedUnit
from .guard import call_reason, own_call_reason

GRANULARITIES = ("auto", "block", "stage")

BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel reduces together, where it is not told otherwise."""

_OF_A_BLOCK = ("fused_forward", "fused_params", "fused_shortcut")
"""Methods that a chain does not call or calls in another's place."""


class FusedStage(FusedSlices, FusedModule):
    """Runs children that follow each other through `fastres.functional.stage`, where they are fused blocks."""

    unit = "stage"
    settings = ("granularity",)

    granularity: str = "auto"
    """One of `GRANULARITIES`, see `Stage`."""

    def forward(self, input: Tensor) -> Tensor:  # by nn.Sequential's name
        x, modules = input, self.__dict__["_modules"]
        for run in self.runs():
            # Asked for each run: a child of another class may return anything.
            if len(run) > 1 and call_reason(x) is None:
                params = [modules[name].fused_params() for name in run]
                x = functional.stage(x, params, backend=modules[run[0]].backend)
            else:
                for name in run:
                    x = modules[name](x)
        return x

    def runs(self) -> list[list[str]]:
        """Names of the children in order, those together that are chained; one by itself is called as a module.

        Raises ValueError for an unknown `granularity`.
        """
        if self.granularity not in GRANULARITIES:
            known = ", ".join(map(repr, GRANULARITIES))
            raise ValueError(f"granularity={self.granularity!r} is not known; use one of {known}")
        if self.granularity == "block":
            return [[name] for name in self.__dict__["_modules"]]
        runs = self._neighbours()
        if self.granularity == "stage" or not _reduces_gradients():
            return runs
        return [part for run in runs for part in ([run] if self._gradient_bytes(run) <= BUCKET else [[n] for n in run])]

    def _neighbours(self) -> list[list[str]]:
        """Longest runs of fused blocks of one backend, and other children."""
        runs: list[list[str]] = []
        backend = None  # of the run that goes on
        for name, child in self.__dict__["_modules"].items():
            alone = alone_reason(child) is not None
            if not alone and child.backend == backend:
                runs[-1].append(name)
            else:
                runs.append([name])
            backend = None if alone else child.backend
        return runs

    def _gradient_bytes(self, run: Sequence[str]) -> int:
        """Of the weights of convolutions, beside which batch norms have little."""
        modules = self.__dict__["_modules"]
        total = 0
        for name in run if len(run) > 1 else ():
            block = modules[name].fused_params().block()
            weights = block.weights if block.projection is None else [*block.weights, block.projection[0]]
            total += sum(weight.nbytes for weight in weights if weight.requires_grad)
        return total

    def alone_reasons(self) -> dict[str, str]:
        """Names of the children that are called as modules, and why."""
        return {run[0]: self._alone_reason(run[0]) for run in self.runs() if len(run) == 1}

    def _alone_reason(self, name: str) -> str:
        if self.granularity == "block":
            return "granularity is 'block'"
        reason = alone_reason(self._modules[name])
        if reason is not None:
            return reason
        run = next(run for run in self._neighbours() if name in run)
        if len(run) == 1:
            return "no neighbour to chain it to"
        held = f"{self._gradient_bytes(run) / 1e6:.0f} MB"
        return f"several processes may reduce gradients, of which a chain would hold back {held}"


def alone_reason(child: nn.Module) -> str | None:
    """Why a child of a stage has to be called as a module, or None where it can be chained to its neighbours."""
    if not isinstance(child, FusedBlock):
        return f"{type(child).__name__} is not a fused block"
    if type(child).forward is not FusedUnit.forward:
        return f"{type(child).__name__} has a forward of its own"
    block = FusedBottleneck if isinstance(child, FusedBottleneck) else FusedBasicBlock
    if any(getattr(type(child), name) is not getattr(block, name) for name in _OF_A_BLOCK):
        return f"{type(child).__name__} has a fused forward of its own"
    if child.__dict__.get("_compiled_call_impl") is not None:
        return "the block is compiled by itself"
    reason = own_call_reason("the block", child) or child.fused_reason()
    if reason is not None:
        return reason
    return None if child.separate_reason() is None else "its shortcut runs as its own module"


def _reduces_gradients() -> bool:
    """Whether other processes may wait for this one's gradients."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Stage(FusedStage, nn.Sequential):
    """Residual blocks one behind the other, fused; to its users an nn.Sequential.

    Blocks of `fastres.nn` that follow each other are chained under one autograd function: in backward, the gradient
    between two of them is masked by the ReLU between them where it is written. Called as modules are a block with a
    hook on itself or on a child, one that cannot be fused or whose shortcut cannot, one that was compiled by itself or
    has no neighbour, and children of other classes. Each block's attribute `backend` chooses its kernels; a change of
    it ends a chain. Autograd unpacks what a chain has saved all at once: where that is offloaded, as by
    torch.autograd.graph.save_on_cpu, "block" needs less memory. It also runs a chain's backward as a whole, where
    gradients of some of its parameters only are asked for.

    The attribute `granularity`: "stage" chains wherever that is possible, "block" nowhere. "auto", the default, chains,
    but in several processes (torch.distributed) nothing of more than 25 MB of gradients: autograd gets those of a chain
    all together, so that DistributedDataParallel would start late to reduce them. In a ResNet-50 in float32 that
    leaves layers 1 and 2 chained.
    """

    stock_class = nn.Sequential
