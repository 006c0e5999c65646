"""`report.md` and its pictures."""

import statistics
from pathlib import Path

from fastres import drawing
from fastres.files import write_text

from . import compare
from .compare import Check, Costs
from .errors import UserError
from .options import Options, command, model_title

STYLES = {
    "stock": {"color": drawing.STOCK, "linestyle": "-"},
    "fused": {"color": drawing.FUSED, "linestyle": (0, (5, 2))},
}
CHECK_COLUMNS = ["check", "stock", "fused", "measured", "limit", "result"]

_SMOOTHING = 25  # steps
_HOW = f"""\
Both started from the same weights and saw the same images in the same order, step by step in turn. What is timed is the
step alone: forward, backward and optimizer, on a batch that is ready. The rate is the median over all steps but the
first {compare.WARMUP_STEPS}."""
_WHY = f"""\
The first {compare.PROOF_STEPS} losses are the proof that both compute the same. Later, differences in the last bit
grow, as they do between any two ways of rounding; then the accuracies are what can be compared."""


def require_matplotlib() -> None:
    """Raises UserError where the pictures could not be drawn: better before the training than after it."""
    if reason := drawing.missing():
        raise UserError(f"argument --compare: {reason}")


def write(
    folder: Path,
    rows: list[dict],
    checks: list[Check],
    costs: dict[str, Costs],
    options: Options,
    dataset_name: str,
    conditions: dict[str, str],
) -> Path:
    """Writes `report.md`, `loss.png`, `accuracy.png` and `costs.png` into `folder`. Returns the report's path.

    Args:
        rows: of `metrics.csv`.
        costs: by variant.
        conditions: what the measurements depend on, see `fastres.info.machine`.
    """
    where = f"{model_title(options)} on {dataset_name}, {options.dtype}, batch {options.batch}"
    _draw_losses(folder / "loss.png", rows, where)
    _draw_accuracy(folder / "accuracy.png", rows, where)
    _draw_costs(
        folder / "costs.png", costs, f"{where}\n{conditions['device']}, CPU threads: {conditions['CPU threads']}"
    )
    path = folder / "report.md"
    write_text(path, _markdown(checks, costs, options, dataset_name, conditions))
    return path


def check_rows(checks: list[Check]) -> list[list[str]]:
    """The checks as cells under `CHECK_COLUMNS`."""
    return [[check.what, check.stock, check.fused, check.measured, check.limit, check.verdict] for check in checks]


def _markdown(checks, costs, options, dataset_name, conditions) -> str:
    stock, fused = costs["stock"], costs["fused"]
    settings = {"dtype": options.dtype, "batch": str(options.batch), "memory format": options.memory_format}
    return "\n".join(
        [
            f"# {model_title(options)} on {dataset_name}: stock and fused, side by side",
            "",
            _HOW,
            "",
            *drawing.table(CHECK_COLUMNS, check_rows(checks)),
            "",
            _WHY,
            "",
            "![Training loss of both, and the difference](loss.png)",
            "",
            "![Test accuracy of both](accuracy.png)",
            "",
            "## What a training step costs",
            "",
            *drawing.table(
                ["", "stock", "fused", "fused / stock"],
                [
                    [
                        "bytes saved for backward per image",
                        f"{stock.saved_per_image:,.0f}",
                        f"{fused.saved_per_image:,.0f}",
                        f"{fused.saved_per_image / stock.saved_per_image:.3f}",
                    ],
                    [
                        "training, images/s",
                        f"{stock.images_per_second:,.0f}",
                        f"{fused.images_per_second:,.0f}",
                        f"{fused.images_per_second / stock.images_per_second:.2f}",
                    ],
                ],
            ),
            "",
            "![Saved bytes and images per second](costs.png)",
            "",
            "## Conditions",
            "",
            *drawing.table(["", ""], [list(row) for row in (conditions | settings).items()]),
            "",
            f"Made by `{command(options)}`. `metrics.csv` holds every step.",
            "",
        ]
    )


def _draw_losses(path: Path, rows: list[dict], where: str) -> None:
    figure = drawing.figure(figsize=(9, 6.5))
    axes = figure.subplot_mosaic([["loss", "loss"], ["first", "all"]], height_ratios=(3, 2))
    for variant, style in STYLES.items():
        steps, losses = zip(
            *((row["step"], row["loss"]) for row in rows if row["variant"] == variant and "loss" in row), strict=True
        )
        axes["loss"].plot(steps, losses, color=style["color"], alpha=0.2, linewidth=0.7)
        axes["loss"].plot(steps, _smooth(losses), label=variant, linewidth=1.8, **style)
    axes["loss"].set_ylabel("training loss")
    axes["loss"].set_xlabel(f"step (mean of {_SMOOTHING}; faint: each)")
    axes["loss"].set_title(f"Training loss: {where}")
    axes["loss"].legend()

    differences = compare.loss_differences(rows)
    first = {step: value for step, value in differences.items() if step <= compare.PROOF_STEPS}
    for name, shown, marker in (("first", first, "o"), ("all", differences, "")):
        # Equal losses have no place on a logarithmic axis: they are drawn at a hundredth of float32's rounding.
        heights = [max(value, 1e-9) for value in shown.values()]
        axes[name].semilogy(list(shown), heights, color="#364fc7", linewidth=0.9, marker=marker, markersize=4)
        axes[name].set_xlabel("step")
    axes["first"].axhline(compare.LOSS_LIMIT, color="black", linewidth=1.2, label=f"limit {compare.LOSS_LIMIT:g}")
    axes["first"].xaxis.get_major_locator().set_params(integer=True)
    axes["first"].set_ylabel("|fused - stock|")
    axes["first"].set_title(f"the first {compare.PROOF_STEPS} steps", fontsize="medium")
    axes["first"].legend()
    axes["all"].set_title("all steps", fontsize="medium")
    drawing.grid(*axes.values())
    drawing.save(figure, path)


def _draw_accuracy(path: Path, rows: list[dict], where: str) -> None:
    figure = drawing.figure(figsize=(8, 4))
    axes = figure.subplots()
    for variant, style in STYLES.items():
        tested = [row for row in rows if row["variant"] == variant and "test_accuracy" in row]
        axes.plot(
            [row["epoch"] for row in tested],
            [row["test_accuracy"] for row in tested],
            marker="o",
            label=variant,
            linewidth=1.8,
            **style,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Test accuracy: {where}")
    axes.legend()
    drawing.grid(axes)
    drawing.save(figure, path)


def _draw_costs(path: Path, costs: dict[str, Costs], where: str) -> None:
    figure = drawing.figure(figsize=(8, 4))
    memory, speed = figure.subplots(1, 2)
    _bars(
        memory,
        {name: cost.saved_per_image / 1e6 for name, cost in costs.items()},
        "{:.3f}",
        "saved for backward, MB per image",
    )
    _bars(speed, {name: cost.images_per_second for name, cost in costs.items()}, "{:,.0f}", "training, images/s")
    figure.suptitle(where, fontsize="medium")
    drawing.save(figure, path)


def _bars(axes, values: dict[str, float], form: str, title: str) -> None:
    names = list(STYLES)
    bars = axes.bar(
        names, [values[name] for name in names], color=[STYLES[name]["color"] for name in names], width=0.55
    )
    axes.bar_label(bars, labels=[form.format(values[name]) for name in names])
    axes.margins(y=0.15)
    axes.set_title(title, fontsize="medium")
    drawing.plain(axes)


def _smooth(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, end - _SMOOTHING) : end]) for end in range(1, len(values) + 1)]
