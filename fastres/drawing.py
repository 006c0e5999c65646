"""What every report needs: Markdown tables, and pictures by matplotlib, imported when the first one is drawn."""

from __future__ import annotations

from pathlib import Path

# One colour for what is ours and one for what it is compared with, in all pictures.
STOCK, FUSED = "#6b7280", "#d9480f"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines]


def missing() -> str | None:
    """Why no picture can be drawn here and what to do, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "the report's pictures need matplotlib; pip install matplotlib"
    return None


def figure(**arguments):
    """An empty figure that needs no screen; the arguments are those of `matplotlib.figure.Figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **arguments)
    FigureCanvasAgg(figure)
    return figure


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=144)


def plain(*many) -> None:
    """Axes without a frame at the top and on the right."""
    for axes in many:
        axes.spines[["top", "right"]].set_visible(False)


def grid(*many) -> None:
    """Axes with a faint grid, for points and lines."""
    plain(*many)
    for axes in many:
        axes.grid(alpha=0.25)
