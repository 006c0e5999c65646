"""`metrics.csv`: what a run measured, one row per training step and one per epoch, for each variant.

| column | step rows | epoch rows |
|---|---|---|
| variant | "stock" or "fused" | the same |
| epoch | counted from 1 | the same |
| step | steps done since the run began | the same |
| lr, loss | learning rate and training loss of this step | empty |
| seconds | time of the step: forward, backward, optimizer; the data is ready before | empty |
| test_loss, test_accuracy | empty | over all test images; accuracy in percent |
"""

import csv
import io
from pathlib import Path

from fastres.files import write_text

from .errors import UserError

COLUMNS = ("variant", "epoch", "step", "lr", "loss", "seconds", "test_loss", "test_accuracy")


class Metrics:
    """Rows in memory and in the file, which is complete whenever `flush` returns.

    Args:
        path: the file; replaced, not appended to.
        rows: what it starts with, from `read`; `add` appends to this list.
    """

    def __init__(self, path: Path, rows: list[dict]):
        self.rows = rows
        write_text(path, _text([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]))
        self._file = open(path, "a", newline="")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def add(self, **row) -> None:
        self.rows.append(row)
        self._file.write(_text([row]))

    def flush(self) -> None:
        self._file.flush()


def read(path: Path, epoch: int, step: int) -> list[dict]:
    """The rows of `path` up to a checkpoint, less those that a killed run wrote after it. Empty where there is no file.

    Args:
        epoch: finished epochs.
        step: steps done.

    Raises:
        UserError: the file does not hold what this program writes.
    """
    try:
        with open(path, newline="") as file:
            # A killed run can leave half a row.
            rows = [_typed(row) for row in csv.DictReader(file) if None not in row.values()]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError) as error:
        raise UserError(
            f"argument --out: {path} is not the metrics of a run ({error}); move it away to resume without them"
        ) from error
    return [row for row in rows if (row["step"] <= step if "loss" in row else row["epoch"] <= epoch)]


def _typed(row: dict) -> dict:
    kinds = {"variant": str, "epoch": int, "step": int}
    return {name: kinds.get(name, float)(row[name]) for name in COLUMNS if row[name] != ""}


def _text(rows: list[dict]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()
