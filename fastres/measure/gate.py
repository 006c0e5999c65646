"""The correctness gate: no speed is recorded for results outside the numerics contract (`fastres.numerics`).

Memory that a kernel allocates is full of NaN while its results are judged, so that what it leaves unwritten shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from fastres import cases
from fastres.kernels import reference
from fastres.numerics import K, three_way

from .timing import reason, release

Named = dict[str, Tensor]
Inputs = dict[str, object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Contract:
    """What errors may be: k times stock's, and a share `slack` of the exact result's norm besides."""

    k: float = K
    slack: float = 0.0


OURS = Contract()

BASELINE = Contract(4.0, 0.01)
"""For PyTorch itself, in another layout or compiled: the gate has to see that it computes the same function. It rounds
at other places than eager channels_last, and a ReLU mask or a maximum that comes out differently is a larger difference
than all arithmetic."""


@dataclass(frozen=True)
class Verdict:
    """text: what was compared and how near the worst came to its bound. refused: why no speed may be recorded, or
    None."""

    text: str
    refused: str | None = None


REFERENCE = Verdict("")
"""Of a variant that the others are compared with."""


def judge(
    ours: Sequence[Named],
    stock: Sequence[Named],
    exact: Sequence[Named],
    dtype: torch.dtype,
    contract: Contract = OURS,
) -> Verdict:
    """The verdict on results by name, of runs from several seeds, whose errors count as one vector.

    exact: in float64, or in float32 for 16-bit `dtype`.
    """
    if not ours[0].keys() == stock[0].keys() == exact[0].keys():
        return Verdict("", f"results differ: {sorted(ours[0])}, stock {sorted(stock[0])}, exact {sorted(exact[0])}")
    shares, failures = {}, []
    for name in exact[0]:
        made, by_stock, right = (torch.cat([run[name].flatten() for run in runs]) for runs in (ours, stock, exact))
        result = three_way(made, by_stock, right.double(), dtype, contract.k)
        result = dataclasses.replace(result, bound=result.bound + contract.slack * result.norm)
        shares[name] = math.inf if math.isnan(result.error) else result.share
        if not result.ok:
            failures.append(f"{name}: {result}")
    worst = max(shares, key=shares.get)
    text = f"{len(shares)} results, worst {100 * shares[worst]:.0f} % of what is allowed ({worst})"
    if contract != OURS:
        text += f", allowed {contract.k:g} times stock's error and {contract.slack:.0%}"
    more = f"; and {len(failures) - 1} more" if len(failures) > 1 else ""
    return Verdict(text, f"wrong results: {failures[0]}{more}" if failures else None)


@contextlib.contextmanager
def no_search() -> Iterator[None]:
    """cuDNN picks its convolutions by rule: a search, at shapes and dtypes that are not timed, takes long."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, False
    try:
        yield
    finally:
        cudnn.benchmark = before


def judge_case(case: cases.Case, k: SimpleNamespace, t: Inputs, batch: int, make: Callable[[int], Inputs]) -> Verdict:
    """The verdict on a kernel case with the launchers of `k`, on inputs `t` of `batch` images, which stay as they are.

    Where their float64 copies do not fit in memory, on inputs that `make` makes of fewer images.
    """
    images = batch
    while True:
        try:
            verdict = _judge_case(case, k, t if images == batch else make(images))
            if images < batch:
                return Verdict(f"{verdict.text}, {images} images", verdict.refused)
            return verdict
        except torch.OutOfMemoryError:
            images //= 2
        except Exception as error:  # a kernel that cannot run is a refused one
            return Verdict("", reason(error))
        release()
        if not images:
            return Verdict("", "the gate is out of memory")


@no_search()
def _judge_case(case: cases.Case, k: SimpleNamespace, t: Inputs) -> Verdict:
    dtype = next(value.dtype for value in t.values() if isinstance(value, Tensor) and value.dim() == 4)
    ours = in_poisoned_memory(lambda: case.run(k, cases.copied(t)))
    stock = case.stock(cases.copied(t))
    with exact_arithmetic():
        exact = case.run(reference, cases.exact_inputs(t))
    return judge([ours], [stock], [exact], dtype)


def in_poisoned_memory(run: Callable[[], Result]) -> Result:
    """`run()` inside `poisoned`; outside, where cuDNN has no deterministic algorithm for one of its convolutions."""
    try:
        with poisoned():
            return run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return run()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, or of the largest integer: PyTorch's own help against unwritten results.

    It comes with deterministic algorithms, which cuDNN's convolutions are then restricted to.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
            torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """TF32 off."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
