"""Stock, the plan that runs today and the complete plan side by side: what `python -m fastres explain` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from fastres.parts import PARTS, Part
from fastres.text import aligned

from .model import SCHEMES, training_step
from .stock import modelled_stock_bytes
from .traffic import Step, total


@dataclass(frozen=True)
class Comparison:
    """A training step of one model under every scheme. Prints as tables.

    steps: by scheme. modelled_stock: bytes of the stock step from its layers' shapes alone.
    """

    input_shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part
    steps: dict[str, list[Step]]
    modelled_stock: int

    def __str__(self) -> str:
        lines = [
            f"A training step of {self.input_shape} in {str(self.dtype).removeprefix('torch.')}: forward and backward, "
            "without the optimizer.",
            f"Floors on one {self.part.name}: {self.part.bandwidth / 1e12:g} TB/s, "
            f"{self.part.rate(self.dtype) / 1e12:g} TFLOP/s ({self.part.source}).",
            "",
            "The plan that runs on a GPU today, counted step by step:",
            "",
            *aligned(self._steps_table(), right_from=3, left_from=6),
            "",
            "All of it:",
            "",
            *aligned(self._totals_table(), right_from=1),
            "",
            "Counted: what PyTorch's operators and our kernels take in and give out, as they are called.",
            "Modelled: stock from its layers' shapes; the complete plan from the contracts of its kernels, one pass",
            "each, with every projection folded. A floor is what moving the bytes or computing the products takes at",
            "the figures above.",
            "Chosen by: the microseconds, measured on the GPU that is there or else modelled, by which the plan took",
            "one namespace and left another; empty where there is one only.",
        ]
        return "\n".join(lines)

    def _steps_table(self) -> list[tuple[str, ...]]:
        table = [("block", "kernel", "backend", "MB", "GFLOP", "floor us", "chosen by")]
        described = [(unit, self._of_unit(unit)) for unit in dict.fromkeys(step.unit for step in self.steps["today"])]
        for rows, same in groupby(described, key=lambda item: item[1]):
            units = [unit for unit, _ in same]
            name = units[0] if len(units) == 1 else f"{units[0]} to {units[-1]}"
            table.append((name, "", "", "", "", "", ""))
            table += rows
        return table

    def _of_unit(self, unit: str) -> tuple[tuple[str, ...], ...]:
        rows = []
        for direction in ("forward", "backward"):
            steps = [step for step in self.steps["today"] if step.unit == unit and step.direction == direction]
            for how in dict.fromkeys((step.kernel, step.backend, step.reason) for step in steps):
                kernel, backend, reason = how
                sums = total([step for step in steps if (step.kernel, step.backend, step.reason) == how])
                rows.append((f"  {direction}", kernel, backend, *_figures(*sums), reason))
        for scheme in SCHEMES:
            sums = total([step for step in self.steps[scheme] if step.unit == unit])
            rows.append(("  both", scheme, "", *_figures(*sums), ""))
        return tuple(rows)

    def _totals_table(self) -> list[tuple[str, ...]]:
        images = self.input_shape[0]
        sums = {scheme: total(steps) for scheme, steps in self.steps.items()}
        stock = sums["stock"].bytes

        def row(name: str, bytes: int, flops: int | None, seconds: float | None) -> tuple[str, ...]:
            others = ("", "") if flops is None else (f"{flops / images / 1e9:.2f}", f"{1e3 * seconds:.2f}")
            return name, f"{bytes / images / 1e6:.1f}", f"{bytes / stock:.3f}", *others

        return [
            ("", "MB/image", "of stock", "GFLOP/image", "floor ms"),
            row("stock eager, counted", *sums["stock"]),
            row("stock eager, modelled", self.modelled_stock, None, None),
            row("the plan that runs today, counted", *sums["today"]),
            row("the complete plan, modelled", *sums["complete"]),
        ]


def compare(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    part: Part = PARTS["h200"],
) -> Comparison:
    """Count a training step of `model` under every scheme; the arguments are those of `training_step`."""
    steps = {scheme: training_step(model, input_shape, dtype, scheme=scheme, part=part) for scheme in SCHEMES}
    return Comparison(tuple(input_shape), dtype, part, steps, modelled_stock_bytes(model, input_shape, dtype))


def _figures(bytes: int, flops: int, seconds: float) -> tuple[str, str, str]:
    return f"{bytes / 1e6:.1f}", f"{flops / 1e9:.2f}" if flops else "", f"{1e6 * seconds:.1f}"
