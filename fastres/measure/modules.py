"""The ways to run one module that are compared, built alike, and what the gate asks of them."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastres
from fastres import backends, memory, plan

from .gate import BASELINE, OURS, Named, Verdict, exact_arithmetic, in_poisoned_memory, judge, no_search

COMPILE_MODES = ("default", "max-autotune", "reduce-overhead")

STOCK = "eager channels_last"
"""The variant that the others' results are compared with."""

GATE_IMAGES = 32
"""At most, where float64 computes what is exact."""

_SEEDS = 4


class Flavour(NamedTuple):
    """How a variant runs a module. mode: of torch.compile. backend, granularity: of `fastres.convert`. Neither mode nor
    backend: eager PyTorch. change: of the plan, to one that it is to be compared with.
    """

    memory_format: torch.memory_format = torch.channels_last
    mode: str | None = None
    backend: str | None = None
    granularity: str = "auto"
    change: Callable[[SimpleNamespace], SimpleNamespace] | None = None

    @property
    def graphs(self) -> bool:
        """Whether CUDA graphs run it, whose memory the allocator's peak does not show."""
        return self.mode in ("max-autotune", "reduce-overhead")


def flavours(dtype: torch.dtype, device: torch.device, modes: Sequence[str]) -> dict[str, Flavour]:
    """By the name of the variant. "fastres library" only where "fastres" runs other kernels. Where those are Triton's,
    two plans with less of them: "fastres stored", the batch norm family between the library's convolutions, and
    "fastres blocks", which has all but the 3x3 convolutions and runs stages block by block.
    """
    found = {"eager NCHW": Flavour(torch.contiguous_format), STOCK: Flavour()}
    found["fastres"] = Flavour(backend="auto")
    origins = plan.origins(dtype, device, "auto")
    if origins != plan.origins(dtype, device, "library"):
        found["fastres library"] = Flavour(backend="library")
    if "triton" in origins.values():
        found["fastres stored"] = Flavour(backend="auto", change=_stored)
        found["fastres blocks"] = Flavour(backend="auto", granularity="block", change=_with_the_librarys_3x3)
    return found | {f"compile {mode}": Flavour(mode=mode) for mode in modes}


def cannot_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot be measured here, or None."""
    if device.type == "cuda":
        return None
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and there is no {compiler}"


def _stored(k: SimpleNamespace) -> SimpleNamespace:
    library = backends.load("library")
    return SimpleNamespace(
        **vars(k) | {name: getattr(library, name) for name in plan.BY_COST} | {"gram_folding": False}
    )


def _with_the_librarys_3x3(k: SimpleNamespace) -> SimpleNamespace:
    choices = ((name, getattr(k, name)) for name in plan.CONV3X3)
    library = {name: choice.launchers["library"] for name, choice in choices if isinstance(choice, plan.PerCall)}
    return SimpleNamespace(**vars(k) | library)


class Subject:
    """A copy of a stock module, made to run as a flavour says, in float64, in float32, or mixed with 16 bits."""

    def __init__(self, stock: nn.Module, flavour: Flavour, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self._device, self._flavour = device, flavour
        self._mixed = dtype.itemsize == 2
        own = copy.deepcopy(stock).to(torch.float32 if self._mixed else dtype)
        self.module = own.to(device, memory_format=flavour.memory_format)
        if flavour.backend is not None:
            fastres.convert(self.module, backend=flavour.backend, granularity=flavour.granularity)
        self._call = self.module
        if flavour.mode is not None:
            # With fullgraph a baseline that cannot be compiled whole raises, and is not silently slow.
            self._call = torch.compile(self.module, mode=flavour.mode, fullgraph=True, dynamic=False)

    def planned(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call by this flavour's plan: a step's backward too, which is made outside of the subject."""
        if self._flavour.change is None:
            return call

        def run():
            with plan.wrapping(self._flavour.change):
                return call()

        return run

    def __call__(self, x: Tensor) -> Tensor:
        return self.planned(lambda: self._forward(x))()

    def _forward(self, x: Tensor) -> Tensor:
        if self._flavour.mode is not None and self._device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self._device.type, self.dtype, enabled=True) if self._mixed else contextlib.nullcontext():
            return self._call(x)

    def place(self, x: Tensor) -> Tensor:
        """A copy of x in this flavour's memory, and of its dtype but where autocast sees to that."""
        dtype = x.dtype if self._mixed else self.dtype
        own = x.detach().to(self._device, dtype, memory_format=self._flavour.memory_format, copy=True)
        return own.requires_grad_(x.requires_grad)

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Afterwards parameters and buffers have their old values, and no gradients."""
        before = [(tensor, tensor.detach().clone()) for tensor in (*self.module.parameters(), *self.module.buffers())]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def decide_masks(self) -> None:
        """Shift every batch norm so far that a whole channel is on, or off, behind its ReLU.

        In 16 bits rounding flips so many masks that they average out. In float32 it is a few or none, each a larger
        difference than all arithmetic: which of two runs has more is chance.
        """
        for norm in (module for module in self.module.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.clamp_(max=1.0)
            norm.bias.fill_(8.0)
            norm.bias[::4] = -8.0

    def saved_bytes(self, x: Tensor) -> int | None:
        """Kept for backward by one forward pass; None where it is compiled."""
        if self._flavour.mode is not None:
            return None
        with self.as_it_was():
            return memory.saved_bytes(self, x, exclude=[*self.module.parameters(), *self.module.buffers()])

    def peak_memory(self, before: int, step: Callable[[], object]) -> int | None:
        """Bytes that `step` has allocated at most, above `before`; None on a CPU and with CUDA graphs."""
        if self._device.type != "cuda" or self._flavour.graphs:
            return None
        for _ in range(2):
            step()
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        step()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


Inputs = tuple[Tensor, Tensor]
"""What goes in, and what the result is met with: a gradient of a unit's output, a model's labels."""


class Gate:
    """Verdicts on the flavours of one module.

    Args:
        stock: the module, on the device.
        batch: of the timed inputs.
        inputs: `inputs(seed, images)` makes them.
        evaluate: the results to compare, of a subject on such inputs.
    """

    def __init__(
        self,
        stock: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        inputs: Callable[[int, int], Inputs],
        evaluate: Callable[[Subject, Tensor, Tensor], Named],
    ):
        self._stock, self._dtype, self._device = stock, dtype, device
        self._batch = batch
        # The errors of a few images are chance.
        self._seeds = _SEEDS if batch < GATE_IMAGES else 1
        self._inputs, self._evaluate = inputs, evaluate
        self._known: dict[tuple[int, torch.dtype], tuple[list[Named], list[Named]]] = {}

    def known(self, flavour: Flavour) -> tuple[list[Named], list[Named]] | None:
        """What this flavour's results are compared with: stock's in the same dtype, and exact ones.

        What is compiled for one batch compiles again for another, and float64 may take minutes at a large one. There
        float32 serves, which is as good as exact beside 16 bits; beside float32 nothing does (None).
        """
        images = self._images(flavour)
        exact_dtype = torch.float64 if images <= GATE_IMAGES else torch.float32
        if exact_dtype == self._dtype:
            return None
        if (images, exact_dtype) not in self._known:
            stock = Subject(self._stock, Flavour(), self._dtype, self._device)
            by_stock = self._results(stock, images)
            with exact_arithmetic():
                exact = self._results(Subject(self._stock, Flavour(), exact_dtype, self._device), images)
            self._known[images, exact_dtype] = by_stock, exact
        return self._known[images, exact_dtype]

    def verdict(self, subject: Subject, flavour: Flavour) -> Verdict:
        """Of a variant that is not itself the reference."""
        known = self.known(flavour)
        if known is None:
            return Verdict("not compared: no exact results at this batch")
        ours = flavour.backend is not None
        images = self._images(flavour)
        found = in_poisoned_memory(lambda: self._results(subject, images)) if ours else self._results(subject, images)
        return judge(found, *known, self._dtype, OURS if ours else BASELINE)

    def forget(self) -> None:
        """Drop the results that are known."""
        self._known.clear()

    def _images(self, flavour: Flavour) -> int:
        return self._batch if flavour.mode is not None else min(self._batch, GATE_IMAGES)

    @no_search()
    def _results(self, subject: Subject, images: int) -> list[Named]:
        found = []
        for seed in range(self._seeds):
            with subject.as_it_was():
                if self._dtype == torch.float32:
                    subject.decide_masks()
                found.append(self._evaluate(subject, *self._inputs(seed, images)))
        return found
