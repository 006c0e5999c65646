"""The pictures of a report. Every function returns a matplotlib figure; `where` names the device and versions."""

from __future__ import annotations

import textwrap

from fastres import drawing

from . import analysis
from .analysis import Case, Memory
from .results import Roofline, Row

_COLORS = {
    "eager NCHW": "#adb5bd",
    "eager": drawing.STOCK,
    "eager channels_last": drawing.STOCK,
    "compile default": "#a5c8ec",
    "compile max-autotune": "#5c96d6",
    "compile reduce-overhead": "#2f5f9e",
    "fastres reference": "#ffd8a8",
    "fastres library": "#f4a261",
    "fastres stored": "#ee8959",
    "fastres blocks": "#dd6b35",
    "fastres projection": "#9c2f06",
    "fastres": drawing.FUSED,
}
_MARKERS = "os^Dv<>PX*hp8dH"
_SHADES = {"forward": 1.0, "backward": 0.65, "optimizer": 0.35}
_BAR = 0.33  # inches of height
MOST_BARS = 40


def color(variant: str) -> str:
    """The colour of a variant, the same in every picture."""
    return _COLORS.get(variant, drawing.FUSED if analysis.is_ours(variant) else "#2f5f9e")


def _ink(variant: str, shade: float = 1.0) -> str:
    """Black or white, whichever reads better on a bar of this variant's colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - shade * (1 - part) for part in to_rgb(color(variant)))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def throughput(cases: list[Case], what: str, where: str):
    """Images per second of every variant, a panel each case; refused variants keep their line."""
    figure, panels = _panels(cases, f"{what}, images/s, measured\n{where}\n(in brackets: relative to eager)")
    for axes, case in zip(panels, cases, strict=True):
        names = [row.variant for row in case.rows]
        bars = axes.barh(
            names, [row.images_per_second or 0.0 for row in case.rows], color=[color(name) for name in names]
        )
        axes.bar_label(bars, labels=[_rate(row, case.reference) for row in case.rows], padding=3, fontsize="small")
        axes.margins(x=0.35)
        _finish_bars(axes, case.title)
    return figure


def _rate(row: Row, reference: Row | None) -> str:
    if row.seconds is None:
        return "refused"
    ratio = analysis.speedup(row, reference)
    return f"{analysis.digits(row.images_per_second)}" + (f" ({analysis.ratio_text(ratio)})" if ratio else "")


def time_split(splits: dict[str, dict[str, dict[str, Row]]], where: str):
    """Forward, backward and optimizer of every variant, stacked; a panel each title.

    splits: title to variant to phase to row.
    """
    from matplotlib.patches import Patch

    figure, panels = _panels(list(splits.values()), f"Where a training step's time goes, ms, measured\n{where}")
    for axes, (title, variants) in zip(panels, splits.items(), strict=True):
        longest = max(sum(row.seconds for row in phases.values()) for phases in variants.values())
        for variant, phases in variants.items():
            left = 0.0
            for phase, row in phases.items():
                shade = _SHADES[phase]
                bars = axes.barh(variant, 1e3 * row.seconds, left=left, color=color(variant), alpha=shade)
                # A narrower part has no room for its figure; the table has it.
                if row.seconds > 0.07 * longest:
                    axes.bar_label(
                        bars,
                        [analysis.digits(1e3 * row.seconds)],
                        label_type="center",
                        fontsize="small",
                        color=_ink(variant, shade),
                    )
                left += 1e3 * row.seconds
            axes.text(left, variant, f" {analysis.digits(left)}", va="center", fontsize="small")
        axes.margins(x=0.15)
        _finish_bars(axes, title)
    figure.legend(
        handles=[Patch(color="black", alpha=alpha, label=phase) for phase, alpha in _SHADES.items()],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def waterfall(steps: list[Row], title: str, modelled: dict[str, float], where: str):
    """Time of one training step from the plainest variant to ours, and beside it the modelled bytes.

    Hatched above a bar: what it saves against the one before.

    Args:
        steps: in the order of the gains.
        modelled: name of a scheme to bytes moved per image; may be empty.
    """
    figure = drawing.figure(figsize=(max(7.0, 1.4 + 1.25 * (len(steps) + len(modelled))), 4.8))
    figure.suptitle(f"One training step: {title}\n{where}", fontsize="medium")
    panels = figure.subplots(
        1, 2 if modelled else 1, squeeze=False, width_ratios=[len(steps), len(modelled)][: 2 if modelled else 1]
    )[0]
    _falling(
        panels[0],
        [row.variant for row in steps],
        [1e3 * row.seconds for row in steps],
        [row.variant for row in steps],
        "measured: ms per step",
    )
    if modelled:
        colors = ["eager channels_last", "fastres library", "fastres"]
        megabytes = [bytes / 1e6 for bytes in modelled.values()]
        _falling(panels[1], list(modelled), megabytes, colors, "modelled, not measured: MB moved per image", 0.55)
    return figure


def _falling(axes, names: list[str], values: list[float], variants: list[str], title: str, shade: float = 1.0) -> None:
    """Bars, the change against the one before above each; `variants` are those whose colours they have."""
    for place, (value, variant) in enumerate(zip(values, variants, strict=True)):
        bar = axes.bar(place, value, color=color(variant), alpha=shade, width=0.6)
        axes.bar_label(bar, [analysis.digits(value)], label_type="center", color=_ink(variant, shade))
    for place, (before, after) in enumerate(zip(values, values[1:], strict=False), start=1):
        if after < before:
            axes.bar(place, before - after, bottom=after, width=0.6, fill=False, hatch="///", edgecolor="#ced4da")
        change = f"{'+' if after > before else ''}{analysis.digits(after - before)}"
        axes.annotate(
            f"{change}\n({analysis.ratio_text(before / after)})",
            (place, max(before, after)),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize="small",
        )
    labels = [textwrap.fill(name, 12, break_long_words=False) for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize="small")
    axes.margins(y=0.16)
    axes.set_title(title, fontsize="medium")
    drawing.plain(axes)


def roofline(rows: list[Row], ceilings: Roofline, where: str):
    """Kernels that compute, by FLOP per byte and FLOP per second, under what this device was measured to reach."""
    from matplotlib.lines import Line2D

    figure = drawing.figure(figsize=(9.5, 5.5))
    axes = figure.subplots()
    markers: dict[str, str] = {}
    for row in rows:
        marker = markers.setdefault(family(row), _MARKERS[len(markers) % len(_MARKERS)])
        axes.plot(
            row.flops / row.bytes,
            row.flops_per_second / 1e12,
            marker,
            color=color(row.variant),
            markeredgecolor="white",
            markersize=8,
            # Ours lie above the baselines.
            zorder=4 if analysis.is_ours(row.variant) else 3,
        )
    intensities = [row.flops / row.bytes for row in rows]
    gemm = {dtype: ceilings.gemm[dtype] for dtype in dict.fromkeys(row.dtype for row in rows)}
    ridges = [flops / ceilings.copy for flops in gemm.values()]
    # Room on the left for the bandwidth's figure, beside its line.
    low, high = min(min(intensities) / 2, min(ridges) / 10), 3 * max(intensities + ridges)
    for dtype, flops in gemm.items():
        ridge = flops / ceilings.copy
        axes.plot(
            [low, ridge, high], [low * ceilings.copy / 1e12, flops / 1e12, flops / 1e12], color="black", linewidth=1
        )
        text = f"{analysis.dtype_text(dtype)} GEMM, {analysis.digits(flops / 1e12)} TFLOP/s"
        axes.annotate(text, (high, flops / 1e12), (0, 4), textcoords="offset points", ha="right", fontsize="small")
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte moved", ylabel="TFLOP/s")
    middle = (low * min(ridges)) ** 0.5
    axes.annotate(
        f"copy, {analysis.digits(ceilings.copy / 1e9)} GB/s",
        (middle, middle * ceilings.copy / 1e12),
        (-8, 0),
        textcoords="offset points",
        ha="right",
        fontsize="small",
    )
    sizes = ", ".join([*map(analysis.dtype_text, gemm), f"batch {_listed(row.batch for row in rows)}"])
    axes.set_title(f"Kernels under the roofline, {sizes}, measured\n{where}", fontsize="medium")
    variants = sorted({row.variant for row in rows}, key=analysis.order)
    handles = [Line2D([], [], marker="o", linestyle="", color=color(name), label=name) for name in variants]
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="black", fillstyle="none", label=name)
        for name, marker in markers.items()
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize="small")
    drawing.grid(axes)
    return figure


def _listed(values) -> str:
    return ", ".join(map(str, sorted(set(values))))


def family(row: Row) -> str:
    """The kernel in a name such as "bn_act, residual" or "CASE / conv1x1_dgrad, y"."""
    return row.name.rpartition(" / ")[2].split(",")[0].split(" ")[0]


def bandwidth(cases: list[Case], ceilings: Roofline, where: str):
    """Our kernels that only move bytes, as shares of the measured copy bandwidth; a tick marks the eager baseline.

    The fastest of ours stands for each case; of more than `MOST_BARS` cases those that take longest are shown.

    Args:
        cases: each with a row of ours whose bytes are known.
    """
    bars = [(case, case.best_ours) for case in cases]
    shown = sorted(bars, key=lambda bar: bar[1].seconds)[-MOST_BARS:]
    shown.sort(key=lambda bar: bar[1].roofline_share(ceilings))
    figure = drawing.figure(figsize=(12, 1.6 + _BAR * len(shown)))
    axes = figure.subplots()
    # Numbers are the places: two cases may have the same name.
    places = range(len(shown))
    shares = [100 * row.roofline_share(ceilings) for _, row in shown]
    axes.barh(places, shares, color=[color(row.variant) for _, row in shown])
    axes.set_yticks(places, [f"{case.title} ({row.variant})" for case, row in shown], fontsize="small")
    ticks = {
        place: 100 * case.reference.roofline_share(ceilings)
        for place, (case, _) in zip(places, shown, strict=True)
        if case.reference is not None and case.reference.bytes
    }
    if ticks:
        axes.plot(ticks.values(), ticks.keys(), "|", color="black", markersize=12, markeredgewidth=2, label="eager")
        figure.legend(loc="outside lower right", frameon=False)
    # The figures stand in a column of their own, where no bar or tick crosses them.
    end = max([100.0, *shares, *ticks.values()])
    for place, value, (_, row) in zip(places, shares, shown, strict=True):
        text = f"{value:.0f} %, {analysis.digits(row.bytes_per_second / 1e9)} GB/s"
        axes.text(1.02 * end, place, text, va="center", fontsize="small")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(0, 1.32 * end)
    axes.set_xlabel(f"% of the copy bandwidth measured, {analysis.digits(ceilings.copy / 1e9)} GB/s")
    some = f", the {MOST_BARS} of {len(bars)} that take longest" if len(bars) > MOST_BARS else ""
    axes.set_title(f"Kernels that only move bytes{some}, measured\n{where}", fontsize="medium")
    drawing.plain(axes)
    return figure


def memory(entries: list[Memory], where: str):
    """MB per image kept for backward and allocated at most, stock above ours."""
    kinds = {"saved": "kept for backward", "peak": "allocated at most"}
    kinds = {kind: what for kind, what in kinds.items() if any(any(getattr(entry, kind)) for entry in entries)}
    figure = drawing.figure(figsize=(3 + 4.5 * len(kinds), 1.6 + 2.2 * _BAR * len(entries)))
    figure.suptitle(f"Training memory, MB per image, measured\n{where}", fontsize="medium")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, (kind, what) in zip(panels, kinds.items(), strict=True):
        for offset, index, variant in ((-0.2, 0, "eager channels_last"), (0.2, 1, "fastres")):
            values = [(getattr(entry, kind)[index] or 0.0) / 1e6 for entry in entries]
            places = [place + offset for place in range(len(entries))]
            bars = axes.barh(places, values, height=0.38, color=color(variant), label=("stock", "fastres")[index])
            axes.bar_label(
                bars, [analysis.digits(value) if value else "" for value in values], padding=3, fontsize="small"
            )
        axes.margins(x=0.15)
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.set_title(what, fontsize="medium")
        drawing.plain(axes)
    panels[0].set_yticks(range(len(entries)), [entry.title for entry in entries], fontsize="small")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _panels(contents: list, title: str):
    """A figure with one panel for each of `contents` (things with a number of lines), two beside each other."""
    columns = min(2, len(contents))
    rows = -(-len(contents) // columns)
    lines = max(len(getattr(content, "rows", content)) for content in contents)
    figure = drawing.figure(figsize=(6.5 * columns, 1.1 + rows * (0.6 + _BAR * lines)))
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(contents) :]:
        axes.set_axis_off()
    return figure, panels[: len(contents)]


def _finish_bars(axes, title: str) -> None:
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize="small")
    axes.set_title(title, fontsize="medium")
    drawing.plain(axes)
