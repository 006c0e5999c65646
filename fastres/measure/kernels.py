"""Kernel cases as experiments: every namespace that has the kernels, and eager PyTorch, on the same inputs.

A case is timed as a whole, which is what eager mode can be compared with, and then kernel by kernel, each call with the
arguments that the case gave it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fastres import backends, cases, cost
from fastres.cost.counting import contract_bytes
from fastres.cost.traffic import Traffic, tensors
from fastres.kernels import reference
from fastres.parts import PARTS

from .experiment import Experiment, Ready, Variant, Work
from .gate import REFERENCE, Inputs, Verdict, judge_case
from .timing import Settings

SETTINGS = {
    "cuda": Settings(burst=2e-4, samples=40, limit=3.0, warmup=0.4, window=10, queued=True),
    "cpu": Settings(burst=5e-3, samples=10, limit=1.0, warmup=0.2, first=1, window=2),
}

_SETS = 8
"""Sets of inputs at most: small tensors stay in the cache in a network too."""


class Maker(cases.Maker):
    """Draws on the device itself: a large activation would take seconds to draw on the host and to copy."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0):
        super().__init__(dtype, device, seed)
        self._own = torch.Generator(device).manual_seed(seed)

    def _random(self, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
        return draw(shape, generator=self._own, dtype=torch.float32, device=self.device).to(self.acc)


class Call(NamedTuple):
    """One call of a kernel, recorded. label: the kernel's name and the optional tensors given, which choose its form.

    work: by the kernel's contract, whichever way a namespace keeps it, so that shares of the roofline compare.
    """

    kernel: str
    label: str
    args: tuple
    kwargs: dict
    work: Work


def namespaces(kernels: Sequence[str], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Those that have one of the kernels and can run there; the reference only where it is the only one."""
    found = [
        name
        for name, unavailable in backends.available().items()
        if name != "reference"
        and unavailable is None
        and any(backends.offers(name, kernel, dtype, device.type) for kernel in kernels)
    ]
    return found or ["reference"]


def launchers(namespace: str) -> SimpleNamespace:
    """The kernels of a namespace, and the library's or the reference's where it has none."""
    modules = [backends.load(name) for name in (namespace, "library", "reference")]
    return SimpleNamespace(
        **{name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in reference.__all__}
    )


def record(
    case: cases.Case,
    k: SimpleNamespace,
    t: Inputs,
    run: Callable[[SimpleNamespace, Inputs], object] | None = None,
) -> dict[str, Call]:
    """The calls that `run` (default: the case's) makes of the case's own kernels, by label; the first of each."""
    calls: dict[str, Call] = {}

    def recording(kernel: str) -> Callable:
        def launch(*args, **kwargs):
            result = getattr(k, kernel)(*args, **kwargs)
            arguments = cost.kernels.bind(kernel, args, kwargs)
            label = _label(kernel, arguments)
            work = Work(contract_bytes(kernel, arguments, result), cost.kernels.flops(kernel, arguments, result))
            calls.setdefault(label, Call(kernel, label, args, kwargs, work))
            return result

        return launch

    own = {kernel: recording(kernel) for kernel in case.kernels}
    (run or case.run)(SimpleNamespace(**vars(k) | own), t)
    return calls


def experiments(
    case: cases.Case,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Mapping[str, int],
    *,
    run: Callable[[SimpleNamespace, Inputs], object] | None = None,
    stock: Callable[[Inputs], object] | None = None,
    eager: Mapping[str, Callable[[Inputs], object]] | None = None,
    whole: bool = True,
    singles: Sequence[str] | None = None,
) -> Iterator[Experiment]:
    """The experiment of the whole case, then those of its kernels, sharing inputs and the gate's verdicts.

    Args:
        sizes: of the inputs, in the order of `Row.shape`; `n` is the batch.
        run: what to time as a whole and to take the kernels' calls from, where the case itself makes more than one
            use of them. It makes each call once.
        stock: PyTorch's operators for the work of `run`; by default the case's.
        eager: PyTorch's operators for the work of single calls, by label.
        whole: whether to time the whole.
        singles: kernels to time one by one; by default all of the case.
    """
    sets = rotated(case.make(Maker(dtype, device), **sizes), cache_of(device))
    verdict = functools.cache(
        lambda name: judge_case(
            case, launchers(name), sets[0], sizes["n"], lambda n: case.make(Maker(dtype, device), **{**sizes, "n": n})
        )
    )
    calls = [record(case, launchers("library"), t, run) for t in sets]

    def experiment(
        name: str, kernels: Sequence[str], items: list, ours: Callable, baseline: Callable | None, work: Work
    ) -> Experiment:
        """ours: makes of the launchers what is called with each of `items` in turn."""
        variants = {
            f"fastres {backend}": _variant(
                over(items, ours(launchers(backend))), work, backend, functools.partial(verdict, backend)
            )
            for backend in namespaces(kernels, dtype, device)
        }
        if baseline is not None:
            variants["eager"] = _variant(over(sets, baseline), least_work(baseline, sets[0], work))
        return Experiment(
            "kernels",
            name,
            ("call",),
            tuple(sizes.values())[:5],
            dtype,
            sizes["n"],
            variants,
            SETTINGS[device.type],
            len(sets),
        )

    if whole:
        total = Work(*map(sum, zip(*(call.work for call in calls[0].values()), strict=True)))
        ours = run or case.run
        yield experiment(
            case.name, case.kernels, sets, lambda k: functools.partial(ours, k), stock or case.stock, total
        )
        if len(calls[0]) == 1:
            return
    for label, first in calls[0].items():
        if singles is None or first.kernel in singles:
            items = [found[label] for found in calls]
            baseline = (eager or {}).get(label)
            yield experiment(f"{case.name} / {label}", [first.kernel], items, _replay, baseline, first.work)


def least_work(baseline: Callable[[Inputs], object], t: Inputs, ours: Work) -> Work:
    """What eager mode's call is charged with: what it computes itself, which is no Gram matrix, and the bytes that have
    to move, which are those of ours where it takes more passes."""
    with Traffic(PARTS["h200"]) as traffic:
        baseline(t)
    own = cost.total(traffic.steps)
    return Work(min(own.bytes, ours.bytes), own.flops)


def _replay(k: SimpleNamespace) -> Callable[[Call], object]:
    return lambda call: getattr(k, call.kernel)(*call.args, **call.kwargs)


def _label(kernel: str, arguments: Mapping[str, object]) -> str:
    optional = [p.name for p in inspect.signature(getattr(reference, kernel)).parameters.values() if p.default is None]
    return ", ".join([kernel, *(name for name in optional if isinstance(arguments[name], Tensor))])


def rotated(t: Inputs, cache: int) -> list[Inputs]:
    """`t` and as many copies that together they are four times as large as a cache of so many bytes."""
    size = sum(value.nbytes for value in tensors(t))
    return [t, *(cases.copied(t) for _ in range(min(math.ceil(4 * cache / size), _SETS) - 1))]


def cache_of(device: torch.device) -> int:
    """Bytes of the L2; a CPU's caches are left as they are."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def over(items: Sequence, call: Callable[[object], object]) -> Callable[[], object]:
    """Calls with one item after the other, and again from the first."""
    turn = itertools.cycle(items)
    return lambda: call(next(turn))


def _variant(
    call: Callable[[], object],
    work: Work,
    backend: str | None = None,
    verdict: Callable[[], Verdict] = lambda: REFERENCE,
) -> Variant:
    return Variant(lambda: Ready({"call": call}, verdict(), {"call": work}), backend)
