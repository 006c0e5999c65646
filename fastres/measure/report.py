"""`report.md` and its pictures from result files: `python -m fastres report`, and the end of a benchmark run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from fastres import drawing
from fastres.files import write_text
from fastres.train.errors import UserError

from . import analysis, comparison, pictures
from .analysis import Case, digits, ratio_text, time_text
from .comparison import Change, Comparison
from .results import Results, ResultsError, Row

FILE_NAME = "report.md"
SUMMARY_COLUMNS = ["name", "phase", "shape", "variant", "time", "rate", "roofline", "vs best baseline"]
REGRESSION_COLUMNS = ["name", "phase", "shape", "variant", "earlier", "now", "longer by", "noise"]

# The model whose step the waterfall shows where several were measured: the one that papers and contests use.
_HEADLINE = "resnet50"
_PARTS_OF_STEP = ("forward", "backward", "optimizer")
_SCHEMES = {"stock": "stock eager", "today": "the plan of today", "complete": "the complete plan"}
_HOW = """\
Times are medians of one call; variants of one case were timed in turn in the same run, after the correctness gate
passed. "2.00x" means twice as fast. Roofline: the least time that moving the bytes and computing the FLOPs takes at the
rates measured on this device, as a share of the time taken."""
_MODELLED = """\
Modelled, not measured (`fastres.cost`): what a step on a GPU moves where every tensor crosses memory once per use. The
complete plan adds what is not built yet."""


def main(arguments) -> int:
    """`python -m fastres report`: 0, or 1 when `--compare` found regressions."""
    from fastres.train.console import print_table

    paths = [Path(path) for path in arguments.results]
    try:
        results = analysis.gather(paths)
    except ResultsError as error:
        raise UserError(f"argument RESULTS: {error}") from error
    try:
        earlier = arguments.compare and analysis.gather([Path(arguments.compare)])
    except ResultsError as error:
        raise UserError(f"argument --compare: {error}") from error
    folder = Path(arguments.out or (paths[0] if paths[0].is_dir() else paths[0].parent))
    try:
        path = write(folder, results, earlier)
    except OSError as error:
        raise UserError(f"argument --out: {folder} cannot be written ({error.strerror}); name another one") from error
    show(results)
    regressions = 0
    if earlier:
        compared = comparison.compare(results, earlier)
        regressions = compared.regressions
        if regressions:
            print_table(f"Slower than {arguments.compare}", REGRESSION_COLUMNS, regression_rows(compared))
        else:
            print(f"nothing of fastres is slower than in {arguments.compare}")
        for name, before, now in _serious(compared):
            print(f"warning: different {name} ({before} earlier, {now} now): times do not compare")
    print(f"report: {path}")
    return 1 if regressions else 0


def write(folder: Path, results: Results, baseline: Results | None = None) -> Path:
    """Writes `report.md` and its pictures into `folder`, which is made. Returns the path of `report.md`.

    What was not measured has no section. Without matplotlib there are no pictures, and the report says so.

    Args:
        baseline: an earlier run to compare with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    no_pictures = drawing.missing()

    def picture(name: str, alt: str, draw: Callable, *arguments) -> list[str]:
        if no_pictures:
            return []
        drawing.save(draw(*arguments, _where(results)), folder / name)
        return [f"![{alt}]({name})", ""]

    sections = [
        _comparison(comparison.compare(results, baseline), baseline) if baseline else [],
        _conditions(results),
        _slower(results),
        _missing(results),
        _models(results, picture),
        _time_split(results, picture),
        _waterfall(results, picture),
        _memory(results, picture),
        _units(results),
        _kernels(results, picture),
    ]
    lines = [f"# fastres measured on {_device(results)}", "", _HOW, ""]
    if no_pictures:
        lines += [f"Without pictures: {no_pictures}.", ""]
    path = folder / FILE_NAME
    write_text(path, "\n".join(lines + [line for section in sections for line in section]))
    return path


def show(results: Results) -> None:
    """Prints what a run found and what it left out."""
    from fastres.train.console import print_table

    print_table(_device(results), *summary(results))
    for line in results.skipped:
        print(f"skipped: {line}")


def summary(results: Results) -> tuple[list[str], list[list[str]]]:
    """What a run found, for `console.print_table`: columns and rows.

    One row for each of our variants and for each variant that was refused, which has the reason in its last cell; the
    fastest baseline where a case has nothing of ours.
    """
    rows = []
    for case in analysis.cases(results.rows):
        shown = {row.variant for row in case.ours or [case.best_baseline] if row} | {
            row.variant for row in analysis.refused(case.rows)
        }
        for row in (row for row in case.rows if row.variant in shown):
            ratio = analysis.speedup(row, case.best_baseline) if row in case.ours else None
            if row.seconds is None:
                figures = ["refused", "", "", analysis.reason(row)]
            else:
                note = f" ({row.note})" if row.note else ""
                figures = [time_text(row.seconds), _rate(row), _share(row, results), ratio_text(ratio) + note]
            rows.append([*_name_cells(row), *figures])
    return SUMMARY_COLUMNS, rows


def regression_rows(compared: Comparison) -> list[list[str]]:
    """Our rows that lost their time or got slower, under `REGRESSION_COLUMNS`; the worst first."""
    broken = [
        [*_name_cells(row), "had a time", "refused: " + analysis.reason(row), "-", "-"] for row in compared.broken
    ]
    return broken + [_change_cells(change) for change in compared.of("slower")]


def modelled_traffic(row: Row) -> dict[str, float]:
    """Bytes that one training step of a model's row moves per image by each scheme of `fastres.cost`.

    Raises ValueError when it is no model of `fastres.models`, or the cost model has no figures for it.
    """
    import torch

    from fastres import cost, models

    if row.name not in models.names():
        raise ValueError(f"{row.name} is no model of fastres.models")
    with torch.device("meta"):
        model = models.create(row.name, in_channels=row.shape[1])
    return {
        name: cost.total(cost.training_step(model, row.shape, getattr(torch, row.dtype), scheme=scheme)).bytes
        / row.batch
        for scheme, name in _SCHEMES.items()
    }


def _device(results: Results) -> str:
    return results.conditions.get("device", "an unnamed device")


def _where(results: Results) -> str:
    """What the figures of all pictures depend on; shape, batch and dtype stand with each case."""
    names = ("torch", "cuDNN", "CPU threads")
    parts = [f"{name} {results.conditions[name]}" for name in names if name in results.conditions]
    return textwrap.fill(", ".join([_device(results), *parts]), 80)


def _conditions(results: Results) -> list[str]:
    lines = ["## Conditions", ""]
    if results.conditions:
        lines += [*drawing.table(["", ""], [list(pair) for pair in results.conditions.items()]), ""]
    if results.roofline is None:
        return [*lines, "The roofline of this device was not measured.", ""]
    rows = [["copy, bytes read and written", f"{digits(results.roofline.copy / 1e9)} GB/s"]]
    rows += [[f"GEMM, {dtype}", f"{digits(flops / 1e12)} TFLOP/s"] for dtype, flops in results.roofline.gemm.items()]
    return [*lines, *drawing.table(["roofline", "measured"], rows), ""]


def _slower(results: Results) -> list[str]:
    cases = [case for case in analysis.cases(results.rows) if case.ours and case.baselines]
    if not cases:
        return []
    pairs = [(row, case.faster_baselines(row)) for case in cases for row in case.ours]
    rows = [
        [
            *_name_cells(row),
            time_text(row.seconds),
            ", ".join(
                f"{other.variant} {time_text(other.seconds)} ({ratio_text(other.seconds / row.seconds)})"
                for other in faster
            ),
        ]
        for row, faster in sorted(pairs, key=lambda pair: -pair[0].seconds / pair[1][0].seconds if pair[1] else 0)
        if faster
    ]
    lines = ["## Slower than a baseline", ""]
    lines += [f"{len(rows)} of {len(pairs)} timed rows of fastres are slower than a baseline of the same case.", ""]
    if rows:
        columns = ["name", "phase", "shape", "variant", "time", "faster baselines (our speed relative to them)"]
        lines += [*drawing.table(columns, rows), ""]
    return lines


def _missing(results: Results) -> list[str]:
    """Refused rows and skipped work."""
    lines = []
    if rows := analysis.refused(results.rows):
        lines += ["## Refused", "", "No speed is reported for these.", ""]
        columns = ["name", "phase", "shape", "variant", "why"]
        lines += [*drawing.table(columns, [[*_name_cells(row), analysis.reason(row)] for row in rows]), ""]
    if results.skipped:
        lines += ["## Skipped", "", *(f"- {' '.join(line.split())}" for line in results.skipped), ""]
    return lines


def _models(results: Results, picture) -> list[str]:
    lines = []
    for phase, what in (("step", "Training step"), ("inference", "Inference")):
        cases = analysis.cases(results.rows, "models", phase)
        if not cases:
            continue
        rows = [
            [
                case.title,
                row.variant,
                digits(row.images_per_second),
                time_text(row.seconds),
                _percentiles(row),
                ratio_text(analysis.speedup(row, case.reference)),
                ratio_text(analysis.speedup(row, case.best_compile)),
                _share(row, results),
                analysis.remarks(row),
            ]
            for case in cases
            for row in case.timed
        ]
        columns = ["model", "variant", "images/s", "time", "p20-p80", "vs eager", "vs best compile", "roofline"]
        columns.append("gate and notes")
        lines += [f"## Models: {what.lower()}", ""]
        lines += picture(
            f"models-{phase}.png", f"{what}: images per second of every variant", pictures.throughput, cases, what
        )
        if rows:
            lines += [*drawing.table(columns, rows), ""]
            lines += ['"vs eager" is channels_last where that was measured.', ""]
    return lines


def _time_split(results: Results, picture) -> list[str]:
    splits: dict[str, dict[str, dict[str, Row]]] = {}
    for case in analysis.cases(results.rows, "models", *_PARTS_OF_STEP):
        for row in case.timed:
            splits.setdefault(case.title, {}).setdefault(row.variant, {})[row.phase] = row
    if not splits:
        return []
    for title, variants in splits.items():
        splits[title] = {
            variant: {phase: variants[variant][phase] for phase in _PARTS_OF_STEP if phase in variants[variant]}
            for variant in sorted(variants, key=analysis.order)
        }
    rows = [
        [title, variant, *(time_text(phases[phase].seconds if phase in phases else None) for phase in _PARTS_OF_STEP)]
        for title, variants in splits.items()
        for variant, phases in variants.items()
    ]
    return [
        "## Forward, backward, optimizer",
        "",
        *picture("time-split.png", "Time of forward, backward and optimizer", pictures.time_split, splits),
        *drawing.table(["model", "variant", *_PARTS_OF_STEP], rows),
        "",
    ]


def _headline(cases: list[Case]) -> Case | None:
    """The case of the waterfall: bfloat16 and the largest batch where there is a choice."""
    able = [case for case in cases if len(_steps(case)) > 1 and case.ours]
    return max(
        able,
        key=lambda case: (case.rows[0].name == _HEADLINE, case.rows[0].dtype == "bfloat16", case.rows[0].batch),
        default=None,
    )


def _steps(case: Case) -> list[Row]:
    return [row for row in case.timed if not row.variant.startswith("compile")]


def _waterfall(results: Results, picture) -> list[str]:
    case = _headline(analysis.cases(results.rows, "models", "step"))
    if case is None:
        return []
    steps = _steps(case)
    modelled, note = {}, []
    try:
        modelled = modelled_traffic(steps[0])
    except (ValueError, RuntimeError) as error:
        note = [f"Bytes are not modelled: {' '.join(str(error).split())}.", ""]
    rows = [
        [
            row.variant,
            time_text(row.seconds),
            *(["-", "-"] if before is None else [_signed(row.seconds - before.seconds), _gain(row, before)]),
        ]
        for before, row in zip([None, *steps], steps, strict=False)
    ]
    lines = [
        f"## What each step bought: {case.title}",
        "",
        *picture("waterfall.png", "One training step, step by step", pictures.waterfall, steps, case.title, modelled),
        *drawing.table(["measured", "one step", "change", "gain"], rows),
        "",
        *note,
    ]
    if modelled:
        stock = next(iter(modelled.values()))
        rows = [[name, f"{bytes / 1e6:.1f}", f"{bytes / stock:.3f}"] for name, bytes in modelled.items()]
        lines += [_MODELLED, "", *drawing.table(["modelled", "MB moved per image", "of stock"], rows), ""]
    return lines


def _memory(results: Results, picture) -> list[str]:
    entries = analysis.memory(results.rows)
    if not entries:
        return []
    rows = [[entry.title, *_pair_cells(entry.saved), *_pair_cells(entry.peak)] for entry in entries]
    columns = ["", "saved: stock", "fastres", "of stock", "peak: stock", "fastres", "of stock"]
    return [
        "## Memory of training, MB per image",
        "",
        "Saved: kept for backward. Peak: the most that was allocated on the device.",
        "",
        *picture("memory.png", "Memory per image, stock and fastres", pictures.memory, entries),
        *drawing.table(columns, rows),
        "",
    ]


def _pair_cells(pair: tuple[float | None, float | None]) -> list[str]:
    stock, ours = pair
    ratio = f"{ours / stock:.3f}" if stock and ours is not None else "-"
    return ["-" if value is None else f"{value / 1e6:.2f}" for value in pair] + [ratio]


def _units(results: Results) -> list[str]:
    cases = analysis.cases(results.rows, "units")
    return ["## Units", "", *_timing_table(cases, results), ""] if cases else []


def _kernels(results: Results, picture) -> list[str]:
    cases = analysis.cases(results.rows, "kernels")
    if not cases:
        return []
    lines = ["## Kernels", ""]
    if results.roofline is not None:
        # Of ours the fastest, as in the other picture: every variant would hide half of the points.
        computing = [
            row
            for case in cases
            for row in (case.reference, case.best_ours)
            if row and row.flops and row.bytes and row.dtype in results.roofline.gemm
        ]
        moving = [case for case in cases if case.best_ours and case.best_ours.bytes and not case.best_ours.flops]
        if computing:
            lines += picture(
                "roofline.png", "Kernels under the measured roofline", pictures.roofline, computing, results.roofline
            )
        if moving:
            lines += picture(
                "bandwidth.png",
                "Share of the copy bandwidth of kernels that only move bytes",
                pictures.bandwidth,
                moving,
                results.roofline,
            )
    return [*lines, *_timing_table(cases, results), ""]


def _timing_table(cases: list[Case], results: Results) -> list[str]:
    columns = [
        *("name", "phase", "shape", "variant", "backend", "time", "p20-p80"),
        *("GB/s", "TFLOP/s", "roofline", "vs eager", "vs library", "gate and notes"),
    ]
    rows = [
        [
            *_name_cells(row),
            row.backend or "-",
            time_text(row.seconds),
            _percentiles(row),
            _scaled(row.bytes_per_second, 1e9),
            _scaled(row.flops_per_second, 1e12),
            _share(row, results),
            ratio_text(analysis.speedup(row, case.reference)),
            ratio_text(analysis.speedup(row, case.library)),
            analysis.remarks(row),
        ]
        for case in cases
        for row in case.timed
    ]
    return drawing.table(columns, rows) if rows else ["All were refused."]


def _comparison(compared: Comparison, baseline: Results) -> list[str]:
    facts = [f"{name} {baseline.conditions[name]}" for name in ("date", "commit") if name in baseline.conditions]
    lines = [f"## Against an earlier run{': ' if facts else ''}{', '.join(facts)}", ""]
    for name, before, now in _serious(compared):
        lines += [f"**Warning: different {name}** ({before} earlier, {now} now): times do not compare.", ""]
    if regressions := regression_rows(compared):
        marked = [["**REGRESSION**", *cells] for cells in regressions]
        lines += ["### Regressions", "", *drawing.table(["", *REGRESSION_COLUMNS], marked), ""]
    else:
        lines += [f"No regressions in {len(compared.changes)} rows that both runs timed.", ""]
    baselines = compared.of("slower", ours=False) + compared.of("faster", ours=False)
    for title, note, changes in (
        ("Improvements", "", compared.of("faster")),
        (
            "Baselines that moved",
            "Nothing of fastres runs in these: the machine, its clocks or PyTorch changed.",
            baselines,
        ),
    ):
        if changes:
            lines += [f"### {title}", "", *([note, ""] if note else [])]
            lines += [*drawing.table(REGRESSION_COLUMNS, [_change_cells(change) for change in changes]), ""]
    same = compared.of("same") + compared.of("same", ours=False)
    if same:
        lines += [f"{len(same)} rows stayed within the noise.", ""]
    for run, rows in (("this run", compared.appeared), ("the earlier run", compared.vanished)):
        if rows:
            cells = [_name_cells(row) for row in rows]
            lines += [f"### Timed only in {run}", "", *drawing.table(REGRESSION_COLUMNS[:4], cells), ""]
    if compared.conditions:
        lines += ["### Conditions that differ", ""]
        lines += [*drawing.table(["", "earlier", "now"], [list(line) for line in compared.conditions]), ""]
    return lines


def _serious(compared: Comparison) -> list[tuple[str, str, str]]:
    """Differing conditions under which a comparison says little."""
    return [line for line in compared.conditions if line[0] in ("device", "torch", "dtypes")]


def _change_cells(change: Change) -> list[str]:
    return [
        *_name_cells(change.now),
        time_text(change.earlier.seconds),
        time_text(change.now.seconds),
        f"{100 * change.longer:+.1f} %",
        f"{100 * change.noise:.1f} %",
    ]


def _name_cells(row: Row) -> list[str]:
    size = f"{analysis.size_text(row)} {analysis.dtype_text(row.dtype)}"
    return [row.name, row.phase, size, row.variant]


def _percentiles(row: Row) -> str:
    return "-" if row.p20 is None or row.p80 is None else f"{time_text(row.p20)} - {time_text(row.p80)}"


def _scaled(value: float | None, scale: float) -> str:
    return "-" if value is None else digits(value / scale)


def _rate(row: Row) -> str:
    if row.images_per_second is not None:
        return f"{digits(row.images_per_second)} img/s"
    return "-" if row.bytes_per_second is None else f"{digits(row.bytes_per_second / 1e9)} GB/s"


def _share(row: Row, results: Results) -> str:
    value = row.roofline_share(results.roofline)
    return "-" if value is None else f"{100 * value:.0f} %"


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{time_text(abs(seconds))}"


def _gain(row: Row, before: Row) -> str:
    return ratio_text(analysis.speedup(row, before))
