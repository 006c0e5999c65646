"""Times of several variants of one piece of work, taken in turn.

Bursts of the variants alternate, so that clocks, temperature and neighbours on the machine hit all alike; medians are
compared. Before that each variant warms up until its time is flat.

On CUDA the instants are events on the current stream: a host clock around asynchronous work would time the launches.
Before every burst the L2 is filled with other data. A burst of a kernel calls it on several sets of inputs that
together are larger than the L2 (`fastres.measure.kernels`), so that no call finds its inputs there. On a CPU the
caches are left as the calls leave them.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Parts = Mapping[str, Callable[[], object]]
"""One variant: what one call of it does, in order, by the name under which each part's time is wanted."""


class Clock(Protocol):
    """Instants in the order of the work that is given to a device."""

    def mark(self) -> object:
        """The instant at which the work given so far is done."""

    def seconds(self, start: object, end: object) -> float:
        """From one mark to another, once `wait` was called."""

    def wait(self) -> None:
        """Return when all work is done."""

    def prepare(self, lead: float) -> None:
        """Make caches cold, and give the device something to do for at least `lead` seconds."""


class HostClock:
    """For a CPU, where a call returns when its work is done."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        pass

    def prepare(self, lead: float) -> None:
        pass


class CudaClock:
    """Events on the current stream of a CUDA device."""

    def __init__(self, device: torch.device):
        self._device = device
        size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**26)
        self._filler = torch.empty(size, dtype=torch.uint8, device=device)
        self._filling = 0.0
        self.prepare(0.0)
        marks = [self.mark()]
        for _ in range(5):
            self.prepare(0.0)
            marks.append(self.mark())
        self.wait()
        self._filling = min(itertools.starmap(self.seconds, itertools.pairwise(marks)))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def prepare(self, lead: float) -> None:
        times = math.ceil(lead / self._filling) if self._filling > 0 else 1
        for _ in range(max(1, times)):
            self._filler.fill_(1)
        # Read back, so that no written line is left in the cache: the burst would pay for storing them.
        self._filler.view(torch.int64).amax()


def clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Settings:
    """How long to measure. Times in seconds.

    burst: what one sample lasts at least; a call that is shorter is repeated in it.
    samples: bursts of each variant at most; `least` are taken even after `limit`.
    limit: for all variants of a case together, warm-up included and compilation not.
    first: calls before anything is timed: they compile, record graphs and allocate.
    window: bursts whose median is compared with that of the window before: warm when within `flat`.
    warmup: longest warm-up of one variant.
    queued: let the device work on something else while the calls of a burst are launched, so that a kernel shorter
        than its launch shows its own time. Not for steps of training, which have to wait for their launches.
    """

    burst: float
    samples: int
    limit: float
    warmup: float
    least: int = 3
    first: int = 3
    window: int = 3
    flat: float = 0.02
    queued: bool = False


@dataclass(frozen=True)
class Timing:
    """parts: seconds of one call by part, a sample each burst. whole: the same of all parts together. note: what a
    reader has to know about them, or ""."""

    parts: dict[str, list[float]]
    whole: list[float]
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """timings by variant; failures: for each variant that raised, why."""

    timings: dict[str, Timing]
    failures: dict[str, str]


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]


def interleaved(
    variants: Mapping[str, Parts],
    clock: Clock,
    settings: Settings,
    *,
    cycle: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Time the variants in turn. One that raises is left out from then on, and the others go on.

    Args:
        cycle: the calls of a burst are a multiple of it: of the sets of inputs that a variant goes through.
        now: the host's clock, for the limits.
    """
    running: dict[str, _Variant] = {}
    failures: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the other variants still run
            running.pop(name, None)
            failures[name] = reason(error)
            # After the handler: a traceback holds the tensors of the call that failed.
        if name in failures:
            release()

    def start(name: str) -> None:
        running[name] = _Variant(variants[name], clock, settings)
        running[name].begin(cycle)

    for name in variants:
        attempt(name, lambda name=name: start(name))
    begun = now()
    for name in list(running):
        attempt(name, lambda name=name: running[name].warm(now))
    for sample in range(settings.samples):
        if sample >= settings.least and now() - begun > settings.limit:
            break
        names = list(running)
        turn = sample % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            attempt(name, lambda name=name: running[name].sample())
    return Outcome({name: variant.timing() for name, variant in running.items()}, failures)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def release() -> None:
    """Give back what a failed or finished call left in memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _Variant:
    """One variant, and what is known of it."""

    def __init__(self, parts: Parts, clock: Clock, settings: Settings):
        self._parts, self._clock, self._settings = parts, clock, settings
        self._calls = 1
        self._lead = self._launching = 0.0
        self._samples: list[list[float]] = []
        self._note = ""

    def begin(self, cycle: int) -> None:
        """The first calls; then how many make a burst, and how long the host takes to launch them."""
        for _ in range(max(self._settings.first, cycle)):
            for call in self._parts.values():
                call()
        self._calls = cycle
        self._burst()
        # Half more than it took: a launch into a full queue waits for room there.
        lead = 1.5 * self._launching if self._settings.queued else 0.0
        self._lead = lead
        seconds = sum(self._burst()) * cycle
        if seconds > 0:
            self._calls = cycle * max(1, math.ceil(self._settings.burst / seconds))
        self._lead = lead * self._calls / cycle

    def warm(self, now: Callable[[], float]) -> None:
        begun, before = now(), None
        while True:
            median = statistics.median(sum(self._burst()) for _ in range(self._settings.window))
            if before is not None:
                drift = abs(median - before) / before if before else 0.0
                if drift <= self._settings.flat:
                    return
                if now() - begun > self._settings.warmup:
                    self._note = f"still moved by {drift:.0%} when warm-up ended"
                    return
            before = median

    def sample(self) -> None:
        self._samples.append(self._burst())

    def timing(self) -> Timing:
        columns = zip(self._parts, zip(*self._samples, strict=True), strict=True)
        whole = [sum(sample) for sample in self._samples]
        return Timing({name: list(column) for name, column in columns}, whole, self._note)

    def _burst(self) -> list[float]:
        """Seconds of one call, part by part: the mean over the calls of a burst."""
        clock, parts, count = self._clock, list(self._parts.values()), self._calls
        clock.wait()
        clock.prepare(self._lead)
        launched = time.perf_counter()
        marks = [clock.mark()]
        for _ in range(count):
            for part in parts:
                part()
                if len(parts) > 1:
                    marks.append(clock.mark())
        if len(parts) == 1:
            marks.append(clock.mark())
        self._launching = time.perf_counter() - launched
        clock.wait()
        spans = [clock.seconds(*pair) for pair in itertools.pairwise(marks)]
        return [sum(spans[position :: len(parts)]) / count for position in range(len(parts))]
