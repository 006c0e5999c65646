"""Plain text for people."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(table: Sequence[Sequence[str]], right_from: int | None = None) -> list[str]:
    """The lines of a table whose first row is the header; columns from `right_from` on are set to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = len(widths) if right_from is None else right_from

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if index >= right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return [line(table[0]), line(["-" * width for width in widths]), *map(line, table[1:])]
