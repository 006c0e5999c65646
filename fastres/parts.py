"""GPUs by name, with what their makers say of them: for floors, which no kernel can run below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """One GPU.

    capability: compute capability as one number. bandwidth: bytes per second of its memory. flops: dense FLOP per
    second of its matrix units by name of the operands' dtype, accumulating in float32; float32 is TF32's rate, which
    PyTorch's convolutions use by default. source: where these stand.
    """

    name: str
    capability: int
    bandwidth: float
    flops: dict[str, float]
    source: str

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of matrix products in `dtype`. ValueError where the makers give none that fits."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            raise ValueError(f"{name} has no figures on {self.name}; use {', '.join(self.flops)}")
        return self.flops[name]

    def seconds(self, bytes: float, flops: float, dtype: torch.dtype) -> float:
        """The floor of work in `dtype`: what moving `bytes` takes or computing `flops`, whichever is longer."""
        return max(bytes / self.bandwidth, flops / self.rate(dtype) if flops else 0.0)


def _part(name: str, capability: int, terabytes: float, half: float, tf32: float, source: str) -> Part:
    rates = {"bfloat16": half, "float16": half, "float32": tf32}
    return Part(name, capability, terabytes * 1e12, {dtype: rate * 1e12 for dtype, rate in rates.items()}, source)


PARTS = {
    "h200": _part("H200 SXM", 90, 4.8, 989.5, 494.7, "NVIDIA H200 Tensor Core GPU datasheet; without sparsity"),
    "h100": _part("H100 SXM", 90, 3.35, 989.5, 494.7, "NVIDIA H100 Tensor Core GPU datasheet; without sparsity"),
    "a100": _part("A100 SXM 80 GB", 80, 2.039, 312, 156, "NVIDIA A100 Tensor Core GPU datasheet; without sparsity"),
    "rtx4090": _part(
        "GeForce RTX 4090", 89, 1.008, 165.2, 82.6,
        "NVIDIA Ada GPU architecture whitepaper, appendix A; without sparsity, float32 accumulation",
    ),
}  # fmt: skip
"""By the name that `python -m fastres explain --part` takes."""


def of_gpu(name: str | None) -> Part:
    """The part that a device's name speaks of; an H200 for others, whose ratio of products to bytes is usual."""
    words = (name or "").lower().replace(" ", "")
    return next((part for short, part in PARTS.items() if short in words), PARTS["h200"])
