"""What result files say: which rows compete with which, what they are measured against, what they keep in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from . import results as result_files
from .results import Results, ResultsError, Row

# In the order in which they are shown; others follow, a baseline before ours.
_BASELINES = (
    "eager NCHW",
    "eager",
    "eager channels_last",
    "compile default",
    "compile max-autotune",
    "compile reduce-overhead",
)
_OURS = ("fastres reference", "fastres library", "fastres stored", "fastres blocks", "fastres")
_REFERENCES = ("eager channels_last", "eager", "eager NCHW")
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}

TRAINING_PHASES = ("forward", "backward", "optimizer", "step")


def is_ours(variant: str) -> bool:
    """Whether a variant is fastres, of any backend, and no baseline."""
    return variant.split(" ")[0] == "fastres"


def order(variant: str) -> tuple[bool, int]:
    """Sorts variants: baselines from the plainest to the fastest kind, then ours from the library's kernels on."""
    ours = is_ours(variant)
    known = _OURS if ours else _BASELINES
    return ours, known.index(variant) if variant in known else len(known)


@dataclass(frozen=True)
class Case:
    """The rows that were timed against each other: one benchmark, one shape, one dtype.

    rows: one a variant, sorted by `order`.
    """

    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Name, shape or batch, dtype: what tells this case from the others of its group."""
        first = self.rows[0]
        size = size_text(first)
        if first.group == "models":
            size = f"batch {first.batch}, {_times(first.shape[2:])}"
        return f"{first.name}, {size}, {dtype_text(first.dtype)}"

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.seconds is not None]

    @property
    def ours(self) -> list[Row]:
        return [row for row in self.timed if is_ours(row.variant)]

    @property
    def baselines(self) -> list[Row]:
        return [row for row in self.timed if not is_ours(row.variant)]

    @property
    def reference(self) -> Row | None:
        """The eager baseline that speed-ups are given against: channels_last where it was measured."""
        by_variant = {row.variant: row for row in self.timed}
        return next((by_variant[variant] for variant in _REFERENCES if variant in by_variant), None)

    @property
    def library(self) -> Row | None:
        """Ours with the library's kernels, which the faster ones have to beat."""
        return next((row for row in self.ours if row.variant == "fastres library"), None)

    @property
    def best_baseline(self) -> Row | None:
        return min(self.baselines, key=_seconds, default=None)

    @property
    def best_compile(self) -> Row | None:
        return min((row for row in self.baselines if row.variant.startswith("compile")), key=_seconds, default=None)

    @property
    def best_ours(self) -> Row | None:
        return min(self.ours, key=_seconds, default=None)

    def faster_baselines(self, row: Row) -> list[Row]:
        """The baselines that took less time than `row`, fastest first."""
        return sorted((other for other in self.baselines if other.seconds < row.seconds), key=_seconds)


def cases(rows: list[Row], group: str | None = None, *phases: str) -> list[Case]:
    """The cases among `rows` of a group and of phases (default: all), in the order of their first rows."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if group in (None, row.group) and (not phases or row.phase in phases):
            found.setdefault(row.case, []).append(row)
    return [Case(tuple(sorted(members, key=lambda row: order(row.variant)))) for members in found.values()]


def speedup(row: Row, other: Row | None) -> float | None:
    """How many times as fast as `other` a timed row is."""
    return None if other is None else other.seconds / row.seconds


def remarks(row: Row) -> str:
    """What the gate found, and what a reader has to know about the time."""
    return "; ".join(filter(None, (row.gate, row.note))) or "-"


def refused(rows: list[Row]) -> list[Row]:
    """The rows without a time."""
    return [row for row in rows if row.seconds is None]


def reason(row: Row) -> str:
    """Why a row has no time."""
    return row.refused or "no time was recorded"


@dataclass(frozen=True)
class Memory:
    """Bytes per image of one model or unit, stock and ours; None where not measured."""

    title: str
    group: str
    stock: Row | None
    saved: tuple[float | None, float | None]
    peak: tuple[float | None, float | None]


def memory(rows: list[Row]) -> list[Memory]:
    """What training keeps and allocates at most, of each model and unit that was measured, models first.

    Rows of all training phases count: the largest figure of a variant is taken.
    """
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.group != "kernels" and row.phase in TRAINING_PHASES and (row.saved_bytes or row.peak_memory):
            found.setdefault((row.group, row.name, row.shape, row.dtype), []).append(row)
    entries = []
    for (group, *_), members in sorted(found.items(), key=lambda item: item[0][0] != "models"):
        variants = {row.variant: row for row in members}
        stock = next((variants[variant] for variant in _REFERENCES if variant in variants), None)
        ours = max(filter(is_ours, variants), key=order, default=None)
        # `order` puts the complete plan last; a variant beyond it is an addition to it.
        ours = "fastres" if "fastres" in variants else ours
        pair = [[row for row in members if row.variant == variant] for variant in (stock and stock.variant, ours)]
        entries.append(
            Memory(
                Case(tuple(members)).title,
                group,
                stock,
                tuple(_largest(part, "saved_bytes") for part in pair),
                tuple(_largest(part, "peak_memory") for part in pair),
            )
        )
    return entries


def _largest(rows: list[Row], field: str) -> float | None:
    return max((getattr(row, field) / row.batch for row in rows if getattr(row, field) is not None), default=None)


def gather(paths: list[Path]) -> Results:
    """The rows of several result files or folders of one device, as if one run had measured them.

    Of rows that measure the same thing the one of the file named last counts. The roofline is the highest of all runs,
    being what the device was seen to reach. ResultsError names two files of different devices.
    """
    files = {path: result_files.read(path) for path in paths}
    (first, *others) = files
    for path in others:
        devices = [files[first].conditions.get("device"), files[path].conditions.get("device")]
        if devices[0] != devices[1]:
            raise ResultsError(
                f"{first} was measured on {devices[0]}, {path} on {devices[1]}; report each device by itself"
            )
    conditions: dict[str, list[str]] = {}
    rows: dict[tuple, Row] = {}
    rooflines = [results.roofline for results in files.values() if results.roofline is not None]
    for results in files.values():
        rows |= {row.key: row for row in results.rows}
        for name, text in results.conditions.items():
            if text not in conditions.setdefault(name, []):
                conditions[name].append(text)
    return Results(
        {name: "; ".join(texts) for name, texts in conditions.items()},
        result_files.highest(rooflines) if rooflines else None,
        list(rows.values()),
        list(dict.fromkeys(line for results in files.values() for line in results.skipped)),
    )


def _seconds(row: Row) -> float:
    return row.seconds


def digits(value: float) -> str:
    """Three significant digits without an exponent; whole numbers with separators."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def time_text(seconds: float | None) -> str:
    """A time with its unit, "-" for None."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{digits(seconds / scale)} {unit}"
    return f"{digits(seconds / 1e-6)} us"


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def size_text(row: Row) -> str:
    """The shape of a row's input; of a convolution among the kernels also the channels of its output."""
    if row.group == "kernels" and len(row.shape) > 4:
        return f"{_times(row.shape[:4])} to {_times(row.shape[4:])}"
    return _times(row.shape)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def dtype_text(dtype: str) -> str:
    """The short name of a dtype: bf16, fp16, fp32."""
    return _DTYPES.get(dtype, dtype)
