"""What the pictures show, read from their axes. All figures here are made up."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from fastres import drawing
from fastres.measure import analysis, pictures
from fastres.measure.results import Roofline, Row

WHERE = "an abacus, torch 2.11.0"
ROOFLINE = Roofline(copy=1e12, gemm={"bfloat16": 1e14, "float32": 1e13})
STEPS = {"eager NCHW": 0.08, "eager channels_last": 0.04, "compile default": 0.032, "fastres library": 0.05}
STEPS |= {"fastres": 0.02}


def row(group, name, phase, variant, seconds, shape=(4, 3, 32, 32), **more):
    return Row(group, name, phase, variant, shape, "bfloat16", 4, seconds=seconds, **more)


def model_rows(name="resnet50", phase="step"):
    return [row("models", name, phase, variant, seconds) for variant, seconds in STEPS.items()]


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def title(figure):
    return figure.get_suptitle() or figure.axes[0].get_title()


def widths(axes):
    return [round(bar.get_width(), 6) for bar in axes.patches]


def heights(axes):
    return [round(bar.get_height(), 6) for bar in axes.patches]


def colors(axes):
    from matplotlib.colors import to_hex

    return [to_hex(bar.get_facecolor()) for bar in axes.patches]


def check(figure, *words):
    """The title says what was measured where, and no text lies beyond the picture's edge."""
    for word in (*words, "measured", WHERE):
        assert word in title(figure)
    figure.canvas.draw()
    inside = figure.bbox.padded(1)
    for axes in figure.axes:
        if axes.axison:
            box = axes.get_tightbbox()
            assert inside.x0 <= box.x0 and inside.y0 <= box.y0 and box.x1 <= inside.x1 and box.y1 <= inside.y1
    box = figure.get_tightbbox().padded(-0.02)
    assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()


def test_throughput_has_a_panel_each_model_and_a_bar_each_variant():
    rows = [*model_rows(), *model_rows("resnet18"), *model_rows("resnet34")]
    rows.append(
        Row("models", "resnet18", "step", "compile max-autotune", (4, 3, 32, 32), "bfloat16", 4, refused="no room")
    )
    figure = pictures.throughput(analysis.cases(rows), "Training step", WHERE)
    check(figure, "Training step", "images/s")
    first, second, third, unused = figure.axes
    assert [axes.get_title() for axes in (first, second, third)] == [
        f"{name}, batch 4, 32x32, bf16" for name in ("resnet50", "resnet18", "resnet34")
    ]
    assert not unused.axison
    assert widths(first) == [50, 100, 125, 80, 200]
    assert [label.get_text() for label in first.get_yticklabels()] == list(STEPS)
    assert texts(first) == ["50.0 (0.50x)", "100 (1.00x)", "125 (1.25x)", "80.0 (0.80x)", "200 (2.00x)"]
    assert texts(second)[3] == "refused" and widths(second)[3] == 0


def test_ours_has_one_colour_and_baselines_have_others():
    figure = pictures.throughput(analysis.cases(model_rows()), "Training step", WHERE)
    found = colors(figure.axes[0])
    assert found[-1] == drawing.FUSED and found[1] == drawing.STOCK
    assert len(set(found)) == len(found)
    waterfall = pictures.waterfall(model_rows(), "resnet50", {}, WHERE)
    assert colors(waterfall.axes[0])[: len(found)] == found


def test_the_time_split_is_stacked():
    phases = {
        "forward": row("models", "resnet50", "forward", "fastres", 0.006),
        "backward": row("models", "resnet50", "backward", "fastres", 0.012),
        "optimizer": row("models", "resnet50", "optimizer", "fastres", 0.0002),
    }
    splits = {"resnet50, batch 4": {"fastres": phases, "eager NCHW": {"backward": phases["backward"]}}}
    figure = pictures.time_split(splits, WHERE)
    check(figure, "ms")
    bars = figure.axes[0].patches
    assert [round(bar.get_x(), 6) for bar in bars] == [0, 6, 18, 0]
    assert widths(figure.axes[0]) == [6, 12, 0.2, 12]
    # The optimizer's part is too narrow for its figure; totals stand at the ends.
    assert [text.strip() for text in texts(figure.axes[0])] == ["6.00", "12.0", "18.2", "12.0", "12.0"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward", "backward", "optimizer"]


def test_the_waterfall_shows_gains_and_keeps_the_model_apart():
    steps = [one for one in model_rows() if not one.variant.startswith("compile")]
    modelled = {"stock eager": 473e6, "the plan of today": 268e6, "the complete plan": 181e6}
    figure = pictures.waterfall(steps, "resnet50, batch 4, bf16", modelled, WHERE)
    measured, model = figure.axes
    assert measured.get_title() == "measured: ms per step"
    assert model.get_title() == "modelled, not measured: MB moved per image"
    assert "resnet50, batch 4, bf16" in title(figure) and WHERE in title(figure)
    assert heights(measured)[:4] == [80, 40, 50, 20]
    # What is saved floats above the bar that saves it; a step that costs has none.
    assert heights(measured)[4:] == [40, 30]
    assert texts(measured) == ["80.0", "40.0", "50.0", "20.0", "-40.0\n(2.00x)", "+10.0\n(0.80x)", "-30.0\n(2.50x)"]
    assert heights(model)[:3] == [473, 268, 181]
    assert texts(model)[3:] == ["-205\n(1.76x)", "-87.0\n(1.48x)"]


def test_without_a_model_the_waterfall_is_wide_enough_for_its_title():
    steps = [row("models", "resnet50", "step", variant, 1.0) for variant in ("eager channels_last", "fastres")]
    figure = pictures.waterfall(steps, "cifar_resnet11_bottleneck, batch 256, 224x224, bf16", {}, "x" * 80)
    assert len(figure.axes) == 1
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.02 and box.x1 <= figure.get_figwidth() + 0.02


def kernels():
    return [
        row("kernels", "conv1x1, stride 1", "call", "eager", 4e-6, (4, 8, 8, 64), bytes=10**6, flops=10**8),
        row("kernels", "conv1x1, stride 1", "call", "fastres", 2e-6, (4, 8, 8, 64), bytes=10**6, flops=10**8),
        row("kernels", "conv3x3 dgrad", "call", "fastres", 2e-5, (4, 8, 8, 64), bytes=10**6, flops=10**9),
    ]


def test_kernels_lie_at_their_intensity_and_rate_under_both_ceilings():
    figure = pictures.roofline(kernels(), ROOFLINE, WHERE)
    check(figure, "bf16", "batch 4")
    axes = figure.axes[0]
    *points, ceiling = axes.lines
    assert [(line.get_xdata()[0], round(line.get_ydata()[0], 6)) for line in points] == [
        (100, 25),
        (100, 50),
        (1000, 50),
    ]
    assert points[0].get_marker() == points[1].get_marker() != points[2].get_marker()
    # The dtype that no kernel has is left out.
    assert texts(axes) == ["bf16 GEMM, 100 TFLOP/s", "copy, 1,000 GB/s"]
    assert ceiling.get_xdata()[1] == 100 and list(ceiling.get_ydata()[1:]) == [100, 100]
    assert ceiling.get_ydata()[0] == pytest.approx(ceiling.get_xdata()[0])
    assert axes.get_xscale() == axes.get_yscale() == "log"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["eager", "fastres", "conv1x1", "conv3x3"]
    for x, y in zip(ceiling.get_xdata(), ceiling.get_ydata(), strict=True):
        assert axes.get_xlim()[0] <= x <= axes.get_xlim()[1] and axes.get_ylim()[0] <= y <= axes.get_ylim()[1]


def moving(count=2):
    rows = []
    for index in range(count):
        shape = (4, 8, 8, 8 * (index + 1))
        for variant, seconds in (("eager", 2e-6), ("fastres library", 5e-6), ("fastres triton", 1.25e-6 * (index + 1))):
            rows.append(row("kernels", "bn_act", "call", variant, seconds, shape, bytes=10**6))
    return analysis.cases(rows)


def test_kernels_that_move_bytes_are_shares_of_the_copy_bandwidth():
    figure = pictures.bandwidth(moving(), ROOFLINE, WHERE)
    check(figure, "only move bytes")
    axes = figure.axes[0]
    # Of ours the faster one; the best at the top.
    assert widths(axes) == [40, 80]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "bn_act, 4x8x8x16, bf16 (fastres triton)",
        "bn_act, 4x8x8x8, bf16 (fastres triton)",
    ]
    assert texts(axes) == ["40 %, 400 GB/s", "80 %, 800 GB/s"]
    assert [round(x, 6) for x in axes.lines[0].get_xdata()] == [50, 50]
    assert "1,000 GB/s" in axes.get_xlabel()


def test_of_many_kernels_the_slowest_are_shown_and_it_says_so():
    figure = pictures.bandwidth(moving(pictures.MOST_BARS + 5), ROOFLINE, WHERE)
    assert len(figure.axes[0].patches) == pictures.MOST_BARS
    assert f"the {pictures.MOST_BARS} of {pictures.MOST_BARS + 5} that take longest" in title(figure)


def test_memory_has_stock_above_ours():
    rows = [
        row("models", "resnet50", "step", "eager channels_last", 1.0, saved_bytes=16 * 10**7, peak_memory=24 * 10**7),
        row("models", "resnet50", "step", "fastres", 1.0, saved_bytes=8 * 10**7, peak_memory=20 * 10**7),
        row("units", "stem", "forward", "fastres", 1.0, saved_bytes=4 * 10**6),
    ]
    figure = pictures.memory(analysis.memory(rows), WHERE)
    check(figure, "MB per image")
    saved, peak = figure.axes
    assert (saved.get_title(), peak.get_title()) == ("kept for backward", "allocated at most")
    assert widths(saved) == [40, 0, 20, 1]
    assert texts(saved) == ["40.0", "20.0", "1.00"]
    assert widths(peak)[::2] == [60, 50]
    assert saved.patches[0].get_y() < saved.patches[2].get_y() and saved.yaxis_inverted()


def test_memory_has_no_panel_for_what_was_not_measured():
    rows = [row("models", "resnet50", "step", "fastres", 1.0, saved_bytes=8 * 10**7)]
    assert len(pictures.memory(analysis.memory(rows), WHERE).axes) == 1
