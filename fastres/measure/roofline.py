"""How fast this device moves and multiplies, measured: what percentages in reports refer to."""

from __future__ import annotations

import contextlib

import torch

from .results import Roofline
from .timing import Clock, Settings, interleaved, release, summary

_CUDA = Settings(burst=0.02, samples=10, limit=3.0, warmup=0.5)
_CPU = Settings(burst=0.02, samples=5, limit=2.0, warmup=0.5)


def measure(device: torch.device, dtypes: list[torch.dtype], clock: Clock) -> Roofline:
    """Time a large copy, and a large matrix product of random numbers in each dtype.

    The buffers are several times as large as the last cache. Zeros would multiply faster than data does, as they draw
    less power. float32 products run in TF32 where PyTorch's settings let matrix products *or convolutions* use it, so
    that no convolution is above the roofline.
    """
    on_cuda = device.type == "cuda"
    settings = _CUDA if on_cuda else _CPU
    count = 2**30 if on_cuda else 2**27
    if on_cuda:
        count = min(count, torch.cuda.mem_get_info(device)[0] // 8)
    seconds = _copy_seconds(count, device, clock, settings)
    size = 8192 if on_cuda else 1024
    gemm = {
        str(dtype).removeprefix("torch."): 2 * size**3 / _gemm_seconds(size, dtype, device, clock, settings)
        for dtype in dtypes
    }
    release()
    return Roofline(2 * count / seconds, gemm)


def _copy_seconds(count: int, device: torch.device, clock: Clock, settings: Settings) -> float:
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median(lambda: target.copy_(source), clock, settings)


def _gemm_seconds(size: int, dtype: torch.dtype, device: torch.device, clock: Clock, settings: Settings) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    with _fastest_float32():
        return _median(lambda: torch.mm(a, b, out=product), clock, settings)


def _median(call, clock: Clock, settings: Settings) -> float:
    outcome = interleaved({"": {"": call}}, clock, settings)
    if outcome.failures:
        raise RuntimeError(f"the roofline cannot be measured: {outcome.failures['']}")
    return summary(outcome.timings[""].whole)[0]


@contextlib.contextmanager
def _fastest_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
