"""A plan's launchers, counting what they move."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from fastres import plan
from fastres.kernels import reference
from fastres.parts import PARTS, Part

from . import kernels
from .traffic import Step, Traffic, tensors, total

ONE_PASS = ("triton", "projection")
"""Namespaces whose kernels move what their contract says; others run as PyTorch's operators, counted one by one."""

Bytes = Callable[[str, kernels.Arguments, object], int]
"""What a kernel moves, given its name, its arguments and its result."""


def contract_bytes(kernel: str, arguments: kernels.Arguments, result: object) -> int:
    """Every argument read once, every result written once."""
    return sum(kernels.reads(kernel, arguments).values()) + kernels.writes(kernel, arguments, result)


def counting(k: SimpleNamespace, traffic: Traffic, every: Bytes | None = None) -> SimpleNamespace:
    """The launchers of `k`; each call adds one step to `traffic`, inside which it has to be made.

    On the meta device a kernel that PyTorch does not run is stood in for by the reference's, which has its shapes.

    every: what each kernel moves, whichever namespace it is from; by default as `ONE_PASS` says.
    """

    def wrapped(kernel: str, launcher: Callable) -> Callable:
        def call(*args, **kwargs):
            runs, reason = plan.choose(launcher, args, kwargs)
            origin = plan.origin(runs)
            one_pass = every if every is not None else contract_bytes if origin in ONE_PASS else None
            arguments = kernels.bind(kernel, args, kwargs)
            on_meta = any(t.device.type == "meta" for t in tensors(arguments))
            first = len(traffic.steps)
            runs = plan.with_passes(runs, lambda passes: counting(passes, traffic))
            result = (getattr(reference, kernel) if on_meta and one_pass else runs)(*args, **kwargs)
            inside = traffic.steps[first:]
            del traffic.steps[first:]
            if one_pass is None:
                sums = total(inside)
                traffic.steps.append(Step(traffic.unit, traffic.direction, kernel, origin, *sums, reason))
            else:
                dtype = tensors(arguments)[0].dtype
                flops = kernels.flops(kernel, arguments, result)
                traffic.record(kernel, origin, one_pass(kernel, arguments, result), flops, dtype, reason)
            return result

        return call

    return SimpleNamespace(**vars(k) | {name: wrapped(name, launcher) for name, launcher in plan.launchers(k).items()})


def count(k: SimpleNamespace, call: Callable[[SimpleNamespace], object], part: Part = PARTS["h200"]) -> list[Step]:
    """The steps of `call(k)`: one for each kernel of `k` that it calls, one for each operator of PyTorch between them.

    k: launchers by name, as `fastres.plan.resolve` gives them; the tensors are real or on the meta device.
    """
    with Traffic(part) as traffic:
        call(counting(k, traffic))
    return traffic.steps
