"""Shared by the Triton kernels: the part that a tensor lives on, argument checks, and small device functions.

A "part" is a compute capability written as one number (80, 90, 100). Each kernel file keeps its configurations in
`CONFIGS[part]`; a GPU of another capability uses the newest part that it is not older than.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.batch_norm import ChannelStats

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels decorated in this process run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take as activations."""

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""SMs of the largest GPU of each part (A100, H200, B200): fixed, so that the order of sums is too."""

PART_WITHOUT_GPU = 90
"""The part whose configurations serve tensors that are on no GPU: interpreted ones, and those of the meta device, whose
launches `fastres.static_checks` records to compile them for each part in turn."""


def configured_part(capability: int) -> int | None:
    """The part whose configurations a GPU of this compute capability uses; None where it is too old."""
    return max((part for part in MULTIPROCESSORS if part <= capability), default=None)


@functools.cache
def _part_of_gpu(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    part = configured_part(10 * major + minor)
    if part is None:
        raise ValueError(
            f"cuda:{index} has compute capability {major}.{minor}, the Triton kernels need 8.0: use backend='library'"
        )
    return part


def part_of(device: torch.device) -> int:
    """The part whose configurations a tensor on `device` uses."""
    return _part_of_gpu(device.index) if device.type == "cuda" else PART_WITHOUT_GPU


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors' own."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def check_device(kernel: str, name: str, tensor: Tensor) -> None:
    """Raise unless the kernels run where `tensor` is."""
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise ValueError(f"{kernel}: {name} is on {tensor.device}, Triton kernels need CUDA: use backend='library'")


def check_activations(kernel: str, **activations: Tensor | None) -> None:
    """Raise unless those given are alike: one shape, one device that the kernels run on, dense, a dtype they take."""
    like_name, like = next((name, t) for name, t in activations.items() if t is not None)
    check_device(kernel, like_name, like)
    for name, t in activations.items():
        if t is None:
            continue
        if t.dtype not in DTYPES:
            raise TypeError(
                f"{kernel}: {name} is {t.dtype}, the Triton kernels take float32, float16 and bfloat16: "
                "use backend='reference'"
            )
        if t.shape != like.shape:
            raise ValueError(
                f"{kernel}: {name} has shape {tuple(t.shape)}, must have {like_name}'s, {tuple(like.shape)}"
            )
        if t.device != like.device:
            raise ValueError(f"{kernel}: {name} must be on {like_name}'s device {like.device}, is on {t.device}")
        if not t.is_contiguous():
            raise ValueError(
                f"{kernel}: {name} must be dense [N, H, W, C], has shape {tuple(t.shape)} and strides {t.stride()}: "
                f"pass {name}.contiguous()"
            )


def check_dense(
    kernel: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device, **tensors: Tensor | None
) -> None:
    """Raise unless those given are dense, of this shape and one of these dtypes, on `device`."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in dtypes or t.shape != shape or t.device != device or not t.is_contiguous():
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{kernel}: {name} must be dense {allowed} {list(shape)} on {device}, "
                f"is {t.dtype} {tuple(t.shape)} on {t.device} with strides {t.stride()}"
            )


def check_vectors(kernel: str, like: Tensor, **vectors: Tensor | None) -> None:
    """Raise unless those given are dense float32 `[4, C]` on the device of `like`, whose last dimension is C."""
    check_dense(kernel, (4, like.shape[-1]), (torch.float32,), like.device, **vectors)


def empty_stats(groups: int, channels: int, device: torch.device) -> ChannelStats:
    """Memory for the Welford partials of this many groups of rows, in float32."""
    mean = torch.empty(groups, channels, dtype=torch.float32, device=device)
    return ChannelStats(torch.empty(groups, dtype=torch.float32, device=device), mean, torch.empty_like(mean))


def ceil_div(a: int, b: int) -> int:
    """a/b rounded up, on the host; `triton.cdiv` is for kernels, and takes microseconds outside them."""
    return -(-a // b)


def channel_units(channels: int) -> tuple[int, int]:
    """C as `(units, UNIT)` with C = units*UNIT and UNIT, a constexpr, the largest power of two up to 16 that divides C.

    Triton knows of an integer argument only whether 16 divides it: of 24 channels it would take one at a time, although
    8 of them fill 16 bytes.
    """
    unit = math.gcd(channels, 16)
    return channels // unit, unit


@triton.jit
def row_vector(vectors, ROW: tl.constexpr, c, C):
    """Row ROW of per-channel vectors `[4, C]` at channels c; zero past C."""
    return tl.load(vectors + ROW * C + c, mask=c < C, other=0.0)


@triton.jit
def channel_vector(vectors, ROW: tl.constexpr, c, C):
    """As `row_vector`, in the form `[1, CHANNELS]` of a tile's row."""
    return row_vector(vectors, ROW, c, C)[None, :]


@triton.jit
def relu(z):
    """max(z, 0) that keeps NaN, as PyTorch's."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
