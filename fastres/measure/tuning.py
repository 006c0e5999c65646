"""Seconds of the calls that the plan has a choice for, measured on this GPU: the tables of `fastres.tuned`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastres import plan
from fastres.conversion import convert
from fastres.cost import kernels, seconds
from fastres.cost.model import on_meta
from fastres.cost.traffic import Operators
from fastres.functional import _library
from fastres.kernels import reference

from . import timing
from .kernels import SETTINGS, cache_of, over, rotated


class Choice(NamedTuple):
    """A call, and the launchers that the plan chooses from for it, by namespace."""

    call: seconds.Call
    launchers: dict[str, Callable]


class _OnMeta(Operators):
    """Runs the bodies of our operators, as shapes."""

    def __init__(self):
        super().__init__()
        self.expand = _library.BODIES.get

    def ran(self, func, args: Sequence, kwargs: dict, result: object) -> None:
        pass


def choices(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype) -> dict[str, Choice]:
    """Those of a training step of the model on a GPU, by the calls' labels; found on the meta device.

    Raises ValueError where the plan has no choice: in float32, and without triton but for convolutions of images.
    """
    found: dict[str, Choice] = {}

    def noting(k: SimpleNamespace) -> SimpleNamespace:
        def noted(name: str, launcher: Callable) -> Callable:
            def launch(*args, **kwargs):
                if isinstance(launcher, plan.PerCall):
                    call = seconds.Call.of(launcher.kernel, args, kwargs)
                    if launcher.only_library is None or launcher.only_library(call.arguments) is None:
                        found.setdefault(call.label, Choice(call, launcher.launchers))
                return getattr(reference, name)(*args, **kwargs)

            return launch

        return SimpleNamespace(**vars(k) | {name: noted(name, one) for name, one in plan.launchers(k).items()})

    twin = convert(on_meta(model, dtype))
    x = torch.empty(*input_shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    with plan.wrapping(noting), _OnMeta():
        twin(x).sum().backward()
    if not found:
        raise ValueError(
            f"{type(model).__name__} in {dtype} leaves the plan of a GPU no choice: tune it in bfloat16 or float16, "
            "where triton is installed"
        )
    return found


def measure(
    wanted: Iterable[Choice], device: torch.device, left: Callable[[], float], settings: timing.Settings | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The median seconds of each call by namespace, and of those that failed the reason, both by the calls' labels.

    left: seconds that there still are. Calls that they do not suffice for are in neither.
    """
    settings = settings or dataclasses.replace(SETTINGS[device.type], limit=0.25, warmup=0.1, samples=15)
    clock = timing.clock(device)
    found, failures = {}, {}
    for choice in wanted:
        label = choice.call.label
        if left() < settings.limit:
            break
        outcome = _time(choice, device, clock, settings)
        if outcome.failures:
            failures[label] = "; ".join(f"{name}: {why}" for name, why in outcome.failures.items())
        else:
            found[label] = {name: statistics.median(timed.whole) for name, timed in outcome.timings.items()}
        del outcome
        timing.release()
    return found, failures


def _time(choice: Choice, device: torch.device, clock: timing.Clock, settings: timing.Settings) -> timing.Outcome:
    arguments = kernels.bind(choice.call.kernel, choice.call.args, choice.call.kwargs)
    sets = rotated(tree_map_only(Tensor, lambda t: _drawn(t, device), arguments), cache_of(device))
    variants = {
        name: {"call": over(sets, lambda t, launcher=launcher: launcher(**t))}
        for name, launcher in choice.launchers.items()
    }
    return timing.interleaved(variants, clock, settings, cycle=len(sets))


def _drawn(t: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).normal_()
