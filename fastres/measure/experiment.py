"""One experiment: variants of the same work on the same shape, gated, timed in turn, and written as rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .gate import Verdict
from .results import Row
from .timing import Clock, Parts, Settings, interleaved, reason, release, summary


class Work(NamedTuple):
    """What one call has to move and to compute."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Ready:
    """A variant that can be timed.

    parts: one for each of the experiment's phases but a last one that stands for all of them. verdict: the gate's.
    work: by phase. finish: called after the timing; gives a reason not to believe the times, or None.
    """

    parts: Parts
    verdict: Verdict
    work: Mapping[str, Work] = field(default_factory=dict)
    peak_memory: int | None = None
    saved_bytes: int | None = None
    finish: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Variant:
    """prepare: builds it, asks the gate and measures memory; may raise. backend: see `Row.backend`. needs: seconds
    that `prepare` and the first calls may take, where they compile."""

    prepare: Callable[[], Ready]
    backend: str | None = None
    needs: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """group, name, shape, dtype, batch: as in `Row`. phases: of the rows; where a call has several parts, theirs and
    then that of the whole.

    variants: by name, in the order in which they are prepared. cycle: see `interleaved`. forget: called when all
    variants are prepared, to drop what only the gate needed.
    """

    group: str
    name: str
    phases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch: int
    variants: Mapping[str, Variant]
    settings: Settings
    cycle: int = 1
    forget: Callable[[], None] = lambda: None

    @property
    def title(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.group}, {self.name}, {'/'.join(self.phases)}, {size}, {_name(self.dtype)}"


@dataclass(frozen=True)
class Report:
    """rows: one for each variant and phase. skipped: what did not fit in the time, and why. failures: variants of ours
    that have no speed, and baselines that compute something else. calls: what was timed, by variant."""

    rows: list[Row]
    skipped: dict[str, str]
    failures: dict[str, str]
    calls: dict[str, Callable[[], None]]


def run(experiment: Experiment, clock: Clock, left: Callable[[], float]) -> Report:
    """Prepare the variants, time those that the gate lets through, and report on all.

    left: seconds of the time budget that remain. A variant that raises, or runs out of memory, is a refused row.
    """
    ready: dict[str, Ready] = {}
    refused: dict[str, str] = {}
    skipped: dict[str, str] = {}
    failures: dict[str, str] = {}
    for name, variant in experiment.variants.items():
        if variant.needs and left() < variant.needs + experiment.settings.limit:
            skipped[f"{experiment.title}, {name}"] = (
                f"{left():.0f} s left, compiling may take {variant.needs:.0f} s and timing all variants "
                f"{experiment.settings.limit:.0f} s"
            )
            continue
        try:
            made = variant.prepare()
        except Exception as error:  # the other variants still run
            refused[name] = reason(error)
        else:
            if made.verdict.refused is None:
                ready[name] = made
            else:
                refused[name] = failures[name] = made.verdict.refused
            del made
        release()
    experiment.forget()
    release()
    outcome = interleaved(
        {name: variant.parts for name, variant in ready.items()}, clock, experiment.settings, cycle=experiment.cycle
    )
    refused |= outcome.failures
    for name in outcome.timings:
        problem = ready[name].finish()
        if problem is not None:
            refused[name] = failures[name] = problem
    failures |= {name: why for name, why in refused.items() if name.startswith("fastres")}
    rows = []
    for name in experiment.variants:
        if name in refused:
            rows += [_row(experiment, name, phase, refused=refused[name]) for phase in experiment.phases]
        elif name in outcome.timings:
            rows += _timed(experiment, name, ready[name], outcome.timings[name])
    calls = {name: functools.partial(_call, ready[name].parts) for name in outcome.timings if name not in refused}
    return Report(rows, skipped, failures, calls)


def _call(parts: Parts) -> None:
    for part in parts.values():
        part()


def _timed(experiment: Experiment, name: str, ready: Ready, timing) -> list[Row]:
    samples = timing.parts
    if len(samples) > 1:
        samples = samples | {experiment.phases[-1]: timing.whole}
    rows = []
    for phase, seconds in samples.items():
        median, p20, p80 = summary(seconds)
        work = ready.work.get(phase)
        rows.append(
            _row(
                experiment,
                name,
                phase,
                seconds=median,
                p20=p20,
                p80=p80,
                samples=len(seconds),
                bytes=work and work.bytes,
                flops=work and work.flops,
                peak_memory=ready.peak_memory,
                saved_bytes=ready.saved_bytes,
                gate=ready.verdict.text,
                note=timing.note,
            )
        )
    return rows


def _row(experiment: Experiment, variant: str, phase: str, **figures) -> Row:
    return Row(
        experiment.group,
        experiment.name,
        phase,
        variant,
        experiment.shape,
        _name(experiment.dtype),
        experiment.batch,
        experiment.variants[variant].backend,
        **figures,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
