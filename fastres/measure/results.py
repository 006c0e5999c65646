"""Result files: what was measured, how fast this machine can go, and under which conditions.

A file is one JSON object: `conditions`, `roofline` and `rows` (one timed variant each). Figures are in base units
(seconds, bytes, FLOP), and beside them stand rates that follow from them; what was not measured is null.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from fastres.files import write_text

FORMAT = 1
GROUPS = ("kernels", "units", "models")
FILE_NAME = "results.json"


class ResultsError(ValueError):
    """A file that is not a result file of this format."""


@dataclass(frozen=True)
class Roofline:
    """What this device did reach, measured at the start of the run.

    copy: bytes per second of a large copy, read and written bytes both counted. gemm: dtype name ("bfloat16") to FLOP
    per second of a large matrix product.
    """

    copy: float
    gemm: dict[str, float]

    def seconds(self, bytes: float, flops: float, dtype: str) -> float:
        """The floor: what moving `bytes` takes or computing `flops`, whichever is longer."""
        return max(bytes / self.copy, flops / self.gemm[dtype] if flops else 0.0)


def highest(rooflines: list[Roofline]) -> Roofline:
    """What a device was seen to reach in any of several runs."""
    gemm: dict[str, float] = {}
    for roofline in rooflines:
        gemm |= {dtype: max(flops, gemm.get(dtype, 0.0)) for dtype, flops in roofline.gemm.items()}
    return Roofline(max(roofline.copy for roofline in rooflines), gemm)


@dataclass(frozen=True)
class Row:
    """One variant of one benchmark.

    group: one of `GROUPS`. name: of the kernel case, unit or model. phase: "call" for kernels; "forward", "backward",
    "optimizer", "step" or "inference" for units and models. variant: "fastres" or "fastres BACKEND" for ours; "eager"
    (kernels), "eager NCHW", "eager channels_last" or "compile MODE" for the baselines. shape: of the input; NHWC for
    kernels, followed by the channels of a convolution's output, NCHW otherwise. dtype: name of the activations'.
    batch: images. backend: namespace of the kernel timed, or None.

    seconds: median of one call; p20, p80: percentiles; samples: how many times were measured. None where `refused`.
    bytes, flops: what the call has to move and to compute (`fastres.cost`), None where that is not known.
    peak_memory: bytes allocated on the device at most; saved_bytes: kept for backward. None where not measured.
    gate: what the correctness gate compared and found, e.g. "12 results, worst 38 % of what is allowed"; "" for
    variants that are themselves the reference. note: what a reader has to know about the time, e.g. that it never
    settled, or "". refused: why no time was recorded (a failed gate, a variant that cannot run here), else None.
    """

    group: str
    name: str
    phase: str
    variant: str
    shape: tuple[int, ...]
    dtype: str
    batch: int
    backend: str | None = None
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int = 0
    bytes: int | None = None
    flops: int | None = None
    peak_memory: int | None = None
    saved_bytes: int | None = None
    gate: str = ""
    note: str = ""
    refused: str | None = None

    @property
    def key(self) -> tuple:
        """What makes rows of two files the same measurement."""
        return self.group, self.name, self.phase, self.variant, tuple(self.shape), self.dtype

    @property
    def case(self) -> tuple:
        """What rows have in common that were timed against each other: all but the variant."""
        return self.group, self.name, self.phase, tuple(self.shape), self.dtype

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None or self.group == "kernels" else self.batch / self.seconds

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.seconds is None or self.bytes is None else self.bytes / self.seconds

    @property
    def flops_per_second(self) -> float | None:
        return None if self.seconds is None or not self.flops else self.flops / self.seconds

    def roofline_share(self, roofline: Roofline | None) -> float | None:
        """The measured floor over the measured time; 1 is as fast as this device was seen to be.

        None where there is no time, nothing known of the work, or the roofline that bounds it was not measured.
        """
        if self.seconds is None or self.bytes is None or roofline is None:
            return None
        if self.flops and self.dtype not in roofline.gemm:
            return None
        return roofline.seconds(self.bytes, self.flops or 0, self.dtype) / self.seconds


@dataclass(frozen=True)
class Results:
    """conditions: what the figures depend on, name to text: device, driver, versions, commit, date, clocks, ...
    (`fastres.info.machine` and more). skipped: what was asked for and did not run, with the reason."""

    conditions: dict[str, str]
    roofline: Roofline | None
    rows: list[Row]
    skipped: list[str] = field(default_factory=list)


def write(path: Path, results: Results) -> None:
    """Write the file whole or not at all; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT} | dataclasses.asdict(results)
    content["rows"] = [dataclasses.asdict(row) | _rates(row, results.roofline) for row in results.rows]
    write_text(path, json.dumps(content, indent=1) + "\n")


def _rates(row: Row, roofline: Roofline | None) -> dict[str, float | None]:
    """For whoever reads the file without this module; `read` leaves them out."""
    return {
        "images_per_second": row.images_per_second,
        "gigabytes_per_second": row.bytes_per_second and row.bytes_per_second / 1e9,
        "teraflops_per_second": row.flops_per_second and row.flops_per_second / 1e12,
        "roofline_percent": share if (share := row.roofline_share(roofline)) is None else 100 * share,
        "saved_bytes_per_image": row.saved_bytes and row.saved_bytes / row.batch,
    }


def read(path: Path) -> Results:
    """Read a file that `write` wrote; a folder means its `results.json`. ResultsError, naming the path, for others."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ResultsError(f"{path} has format {content['format']}, this version of fastres reads {FORMAT}")
        roofline = content["roofline"] and Roofline(**content["roofline"])
        fields = {field.name for field in dataclasses.fields(Row)}
        own = [{name: value for name, value in row.items() if name in fields} for row in content["rows"]]
        rows = [Row(**(row | {"shape": tuple(row["shape"])})) for row in own]
        return Results(content["conditions"], roofline, rows, content["skipped"])
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{path} is not a result file of fastres: {error}") from error
