"""What `--compare` proves: the same losses, the same accuracy, less memory."""

import copy
import dataclasses
import statistics

import torch
from torch import nn

import fastres
import fastres.nn

from ..memory import saved_bytes
from .engine import Trainer
from .options import Options

PROOF_STEPS = 20  # later the two runs drift apart, as two runs with any other rounding do: training is chaotic
LOSS_LIMIT = 1e-3
ACCURACY_GAP_LIMIT = 1.0  # percentage points
BLOCK_MEMORY_LIMIT = 0.56
WARMUP_STEPS = 5  # left out of the throughput


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the final table. `ok` is None where this run could not measure it."""

    what: str
    stock: str
    fused: str
    measured: str
    limit: str
    ok: bool | None

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAILED", None: "not measured"}[self.ok]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one variant: bytes of saved activations per image, and images per second of training."""

    saved_per_image: float
    images_per_second: float


def checks(rows: list[dict], options: Options) -> list[Check]:
    """The lines of the table, from a finished run's metrics and a measurement of three blocks."""
    lines = [_losses(rows, options.dtype), *_accuracies(rows, options.min_accuracy)]
    stock, fused = block_memory()
    ratio = fused / stock
    lines.append(
        Check(
            "bytes saved by 3 bottlenecks, w = 64, 28x28, batch 8",
            f"{stock / 1e6:.2f} MB",
            f"{fused / 1e6:.2f} MB",
            f"{ratio:.3f} of stock",
            f"<= {BLOCK_MEMORY_LIMIT}",
            ratio <= BLOCK_MEMORY_LIMIT,
        )
    )
    return lines


def loss_differences(rows: list[dict]) -> dict[int, float]:
    """|loss of fused - loss of stock| by step."""
    losses = {"stock": {}, "fused": {}}
    for row in rows:
        if "loss" in row:
            losses[row["variant"]][row["step"]] = row["loss"]
    return {step: abs(losses["fused"][step] - loss) for step, loss in losses["stock"].items()}


def block_memory() -> tuple[int, int]:
    """Bytes that three identity bottlenecks save for backward, stock and fused: float32, w = 64, 28x28, batch 8."""
    fused = nn.Sequential(*(fastres.nn.Bottleneck(256, 64) for _ in range(3))).to(memory_format=torch.channels_last)
    stock = fastres.revert(copy.deepcopy(fused))
    x = torch.randn(8, 256, 28, 28).to(memory_format=torch.channels_last).requires_grad_()
    return saved_bytes(stock, x), saved_bytes(fused, x)


def costs(name: str, trainer: Trainer, options: Options, device: torch.device, batch, rows: list[dict]) -> Costs:
    """Measured on one batch of the training data, on the training device and in the training dtype."""
    probe = Trainer(copy.deepcopy(trainer.model), options, device)
    images, labels = probe.place(*batch)
    saved = saved_bytes(probe.loss, images, labels, exclude=probe.model.buffers())
    seconds = [row["seconds"] for row in rows if row["variant"] == name and "seconds" in row]
    median = statistics.median(seconds[WARMUP_STEPS:] or seconds)
    return Costs(saved / len(labels), options.batch / median)


def _losses(rows: list[dict], dtype: str) -> Check:
    differences = loss_differences(rows)
    steps = min(PROOF_STEPS, max(differences))
    what, limit = f"largest |loss difference|, first {steps} steps, float32", f"<= {LOSS_LIMIT:g}"
    if dtype != "fp32":
        return Check(what, "", "", "needs --dtype fp32", limit, None)
    first = [differences.get(step) for step in range(1, steps + 1)]
    if None in first:
        return Check(what, "", "", "metrics.csv lacks them", limit, None)
    stock, fused = (f"{_loss_at(rows, variant, steps):.6f}" for variant in ("stock", "fused"))
    # Not by max(), which passes over a NaN.
    return Check(what, stock, fused, f"{max(first):.1e}", limit, all(value <= LOSS_LIMIT for value in first))


def _accuracies(rows: list[dict], floor: float) -> list[Check]:
    last = {row["variant"]: row["test_accuracy"] for row in rows if "test_accuracy" in row}
    stock, fused = (f"{last[variant]:.2f} %" for variant in ("stock", "fused"))
    gap, lower = abs(last["fused"] - last["stock"]), min(last.values())
    lines = [
        Check(
            "test accuracy of stock and fused",
            stock,
            fused,
            f"{gap:.2f} points apart",
            f"<= {ACCURACY_GAP_LIMIT:g} point",
            gap <= ACCURACY_GAP_LIMIT,
        )
    ]
    if floor:
        lines.append(
            Check("lower test accuracy of the two", stock, fused, f"{lower:.2f} %", f"> {floor:g} %", lower > floor)
        )
    return lines


def _loss_at(rows: list[dict], variant: str, step: int) -> float:
    return next(row["loss"] for row in rows if row["variant"] == variant and row["step"] == step and "loss" in row)
