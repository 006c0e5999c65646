"""What a person sees: progress bars and tables by rich where it is installed, plain text where it is not.

Where the output is no terminal there are no bars, only a line per epoch.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from fastres.text import aligned


class Progress(contextlib.AbstractContextManager):
    """A bar over the steps of an epoch, and a line when the epoch is done."""

    def __init__(self):
        self._bar = None
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                self._bar = _bar()

    def __enter__(self):
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", losses="")
        return self

    def __exit__(self, *error):
        if self._bar:
            self._bar.remove_task(self._task)
            self._bar.stop()

    def epoch(self, epoch: int, epochs: int, step: int, steps: int) -> None:
        """An epoch begins, or goes on, at `step` of `steps`."""
        if self._bar:
            self._bar.reset(
                self._task, completed=step, total=steps, description=f"epoch {epoch + 1}/{epochs}", losses=""
            )

    def step(self, step: int, losses: dict[str, float]) -> None:
        """`step` steps of the epoch are done."""
        if self._bar:
            text = "  ".join(f"{name} loss {loss:.3f}" for name, loss in losses.items())
            self._bar.update(self._task, completed=step, losses=text)

    def tested(self, epoch: int, epochs: int, accuracies: dict[str, float]) -> None:
        """`epoch` epochs are done and tested; accuracies in percent."""
        text = "  ".join(f"{name} {accuracy:.2f} %" for name, accuracy in accuracies.items())
        self.log(f"epoch {epoch}/{epochs}  test accuracy: {text}")

    def log(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


@contextlib.contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over things that are counted, on stderr where that is a terminal. Gives `update(done, total)`."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout. Cells "ok" and "FAILED" are coloured on a terminal."""
    try:
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(f"\n{title}")
        print(*aligned([columns, *rows]), sep="\n")
        return
    table = Table(*columns, title=Text(title), title_justify="left")
    styles = {"ok": "bold green", "FAILED": "bold red"}
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    # A log has no width of its own: 80 columns would fold the cells. No word is cut for a terminal that is too narrow.
    console = Console(width=None if sys.stdout.isatty() else 160)
    needed = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.width = max(console.width, needed)
    console.print(table)


def _bar():
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
