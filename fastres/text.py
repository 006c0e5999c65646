"""Plain text for people."""

from __future__ import annotations

from collections.abc import Sequence


def listed(phrases: Sequence[str], most: int) -> str:
    """The phrases, of which at most so many are shown; "" without any."""
    more = len(phrases) - most
    return "; ".join([*phrases[:most], *[f"and {more} more"] * (more > 0)])


def aligned(table: Sequence[Sequence[str]], right_from: int | None = None, left_from: int | None = None) -> list[str]:
    """The lines of a table whose first row is the header; columns from `right_from` on are set to the right, those from
    `left_from` on to the left again.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = range(len(widths))[right_from:left_from] if right_from is not None else ()

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return [line(table[0]), line(["-" * width for width in widths]), *map(line, table[1:])]
