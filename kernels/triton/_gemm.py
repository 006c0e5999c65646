"""Shared by the Triton GEMMs: tiles and their choice, operands, statistics of outputs, and the sum of partial products.

**House form.** The accumulator is `[channels, pixels]` = weight tile times pixel tile transposed, wherever no prologue
changes the pixels: then TMA feeds both operands to shared memory and wgmma reads them there. An operand with a prologue
(BN + ReLU, a mask, dy) passes through registers; it is the first operand where that saves the way back to shared
memory. Epilogues work on `parts` of the accumulator one after the other: an epilogue on all of it, not the accumulator
itself, is what spills.

**Operands.** On parts with TMA a 16-bit matrix whose rows are multiples of 16 bytes comes as a descriptor made by the
host; every other comes as a pointer with masks: float32, parts without TMA, other channel counts, strided pixels. Rows
and channels past the end read as zero and are not written, in both forms.

**Tiles.** Of every kernel and class of widths there is one preferred tile and one behind it, of fewer registers (below
200) and less shared memory (a compute capability of 8.6 or 8.9 has 99 KiB). `choose` takes the second where the first
does not fit the GPU, or spills registers with the installed Triton: that shows once it is loaded, so its first launch
stands, and the order of sums is that of the second tile from the next launch on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import ceil_div, channel_units, check_activations, on_device, part_of, relu, row_vector

Result = TypeVar("Result")


class Tile(NamedTuple):
    """How one program works.

    pixels, channels: of what it accumulates; in a wgrad or Gram matrix both are channels, and `depth` pixels. depth: of
    one step of the loop over the product's inner dimension. parts: of the accumulator in the epilogue. num_stages:
    steps in flight and in use.
    """

    pixels: int
    channels: int
    depth: int
    parts: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As a kernel takes it."""
        pixels, channels, depth, parts, num_warps, num_stages = self
        return {
            "PIXELS": pixels,
            "CHANNELS": channels,
            "DEPTH": depth,
            "PARTS": parts,
            "STAGES": num_stages,
            "num_warps": num_warps,
        }


Choices = tuple[Tile, ...]
"""The preferred tile and the one behind it."""

FLOAT32: Choices = (Tile(64, 64, 16, 2, 8, 3), Tile(64, 32, 16, 1, 4, 2))
"""Of convolutions in float32, whose products are not for tensor cores, on every part."""

PREFERRED = 0
"""The first of `Choices` that is tried: 1 makes every kernel run the tile behind the preferred one, for the tests."""

_rejected: set[tuple[str, torch.device, torch.dtype, Tile]] = set()


def choices(
    configs: dict[int, dict[str, dict[int, Choices]]],
    form: str,
    like: Tensor,
    channels: int,
    tma: bool,
    float32: Choices = FLOAT32,
) -> Choices:
    """Of choices by part, form of a kernel and the widest channel count that they are for, those for `channels` and for
    the dtype and device of `like`. The last serve all wider ones.

    What comes by pointers takes the tiles of 80 on every part.
    """
    if like.dtype == torch.float32:
        return float32
    widths = configs[part_of(like.device) if tma else 80][form]
    return widths[next((limit for limit in widths if channels <= limit), max(widths))]


def choose(form: str, tiles: Choices, like: Tensor, launch: Callable[[Tile], tuple[Result, object]]) -> Result:
    """Launch with the first tile that fits the GPU of `like` and spills no registers there.

    launch: given a tile, launches and returns a result and what Triton gave for the launch. A tile that spills is
    found out by its first launch, whose result stands.
    """
    remaining = list(tiles[min(PREFERRED, len(tiles) - 1) :])
    with on_device(like.device):
        while True:
            tile = remaining.pop(0)
            key = form, like.device, like.dtype, tile
            if remaining and key in _rejected:
                continue
            try:
                result, compiled = launch(tile)
            except OutOfResources:
                if not remaining:
                    raise
                _rejected.add(key)
                continue
            if getattr(compiled, "n_spills", 0):
                _rejected.add(key)
            return result


def has_tma(part: int, *operands: Tensor | None) -> bool:
    """Whether a part loads all of these `[..., channels]` by TMA."""
    return part >= 90 and all(
        t is None or (t.itemsize == 2 and t.shape[-1] % 8 == 0 and t.data_ptr() % 16 == 0) for t in operands
    )


def operand(t: Tensor | None, rows: int, columns: int, tma: bool) -> Tensor | TensorDescriptor | None:
    """Dense t `[..., channels]` as a kernel takes it: a descriptor of tiles of this size, or the tensor itself."""
    if t is None or not tma:
        return t
    channels = t.shape[-1]
    return TensorDescriptor(t, [t.numel() // channels, channels], [channels, 1], [rows, columns])


def units(*channels: int) -> tuple[int, ...]:
    """The run-time halves of `channel_units`."""
    return tuple(channel_units(count)[0] for count in channels)


def unit(*channels: int) -> tuple[int, ...]:
    """The constexpr halves of `channel_units`."""
    return tuple(channel_units(count)[1] for count in channels)


def strided_size(size: int, stride: int) -> int:
    """Pixels along one axis that a 1x1 conv of this stride reads."""
    return (size - 1) // stride + 1


def check_strided(kernel: str, name: str, x: Tensor, like_name: str, like: Tensor, stride: int) -> None:
    """Raise unless x `[N, H, W, C]` is an activation whose strided pixels are those of `like`."""
    check_activations(kernel, **{name: x})
    expected = (x.shape[0], *(strided_size(size, stride) for size in x.shape[1:3]))
    if tuple(like.shape[:3]) != expected or like.device != x.device or like.dtype != x.dtype:
        raise ValueError(
            f"{kernel}: {like_name} must be {x.dtype} [{', '.join(map(str, expected))}, channels] on {x.device}, the "
            f"pixels of {name} at stride {stride}, is {like.dtype} {tuple(like.shape)} on {like.device}"
        )


@triton.jit
def load_tile(t, row, column, M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """The tile at (row, column) of t `[M, C]`; zero past its end."""
    if TMA:
        tile = t.load([row, column])
    else:
        r = tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < M - row)[:, None] & (c < C)[None, :]
        tile = tl.load(t + tl.cast(row, tl.int64) * C + (r[:, None] * C + c[None, :]), mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(t, tile, row, column, M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Write the tile at (row, column) of t `[M, C]`, in t's dtype, as far as it lies inside."""
    if TMA:
        t.store([row, column], tile.to(t.dtype))
    else:
        r = tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < M - row)[:, None] & (c < C)[None, :]
        pointers = t + tl.cast(row, tl.int64) * C + (r[:, None] * C + c[None, :])
        tl.store(pointers, tile.to(t.dtype.element_ty), mask=inside)


@triton.jit
def _pixel_offsets(row, M, H, W, HO, WO, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Of output pixels row.. the input pixels that a 1x1 conv of this stride reads, in 64 bits."""
    pixel = row + tl.arange(0, ROWS)
    inside = tl.arange(0, ROWS) < M - row
    image = pixel // (HO * WO)
    h = pixel // WO % HO
    return (tl.cast(image, tl.int64) * H + h * STRIDE) * W + pixel % WO * STRIDE, inside


@triton.jit
def load_pixels(
    t, row, column, M, C, H, W, HO, WO, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """As `load_tile`, of the rows of t `[N, H, W, C]` that M strided output pixels `[N, HO, WO]` read."""
    if STRIDE == 1:
        tile = load_tile(t, row, column, M, C, ROWS, COLUMNS, TMA)
    else:
        pixels, inside = _pixel_offsets(row, M, H, W, HO, WO, STRIDE, ROWS)
        c = column + tl.arange(0, COLUMNS)
        pointers = t + pixels[:, None] * C + c[None, :]
        tile = tl.load(pointers, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    return tile


@triton.jit
def store_pixels(
    t, tile, row, column, M, C, H, W, HO, WO, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """As `store_tile`, at the pixels that `load_pixels` reads."""
    if STRIDE == 1:
        store_tile(t, tile, row, column, M, C, ROWS, COLUMNS, TMA)
    else:
        pixels, inside = _pixel_offsets(row, M, H, W, HO, WO, STRIDE, ROWS)
        c = column + tl.arange(0, COLUMNS)
        pointers = t + pixels[:, None] * C + c[None, :]
        tl.store(pointers, tile.to(t.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def activation(y, vectors, c, C):
    """relu(scale*y + shift) of a tile `[pixels, channels c]`, rounded to y's dtype as a GEMM reads it."""
    scale = tl.broadcast_to(row_vector(vectors, 2, c, C)[None, :], y.shape)
    shift = tl.broadcast_to(row_vector(vectors, 3, c, C)[None, :], y.shape)
    # fma in every kernel: whether a ReLU lets a value pass must not depend on who asks.
    return relu(tl.fma(y.to(tl.float32), scale, shift)).to(y.dtype)


@triton.jit
def masked(g, z):
    """g where the ReLU whose input or output z is lets it pass; NaN passes."""
    return tl.where(z <= 0, 0.0, g).to(g.dtype)


@triton.jit
def part(acc, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """Columns [INDEX*n/PARTS, +n/PARTS) of acc `[m, n]`, without moving data; PARTS is 1, 2 or 4."""
    if PARTS == 1:
        found = acc
    else:
        ROWS: tl.constexpr = acc.shape[0]
        HALF: tl.constexpr = acc.shape[1] // 2
        first, second = acc.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        if PARTS == 2:
            found = first if INDEX == 0 else second
        else:
            chosen = first if INDEX < 2 else second
            third, fourth = chosen.reshape(ROWS, 2, HALF // 2).permute(0, 2, 1).split()
            found = third if INDEX % 2 == 0 else fourth
    return found


@triton.jit
def merge_statistics(part, live, rows, seen, mean, m2):
    """How many pixels a tile has by now, and their mean and centred sum of squares per channel, by Chan's formula.

    mean, m2: of the `seen` pixels before this part `[channels, pixels]`, which is rounded, as the batch norm reads it.
    live: which of its pixels exist; rows: how many.
    """
    value = tl.where(live[None, :], part.to(tl.float32), 0.0)
    part_mean = tl.sum(value, 1) / tl.maximum(rows, 1.0)
    deviation = tl.where(live[None, :], value - part_mean[:, None], 0.0)
    share = rows / tl.maximum(seen + rows, 1.0)
    delta = part_mean - mean
    mean += delta * share
    m2 += tl.sum(deviation * deviation, 1) + delta * delta * (seen * share)
    return seen + rows, mean, m2


@triton.jit
def store_statistics(count, mean, m2, group, seen, group_mean, group_m2, k, K, CHANNELS: tl.constexpr):
    """Write what `merge_statistics` gave for the channels from k on as those of this group of pixels."""
    channels = k + tl.arange(0, CHANNELS)
    at = tl.cast(group, tl.int64) * K + channels
    tl.store(mean + at, group_mean, mask=channels < K)
    tl.store(m2 + at, group_m2, mask=channels < K)
    if k == 0:
        tl.store(count + group, seen)


def precision(dtype: torch.dtype) -> str:
    """How to multiply weights of this dtype by a float32 matrix, to about float32's digits.

    Three TF32 products do for 16-bit weights, which TF32 holds as they are. For float32 weights both factors would lose
    digits: there the product is that of the cores for scalars.
    """
    return "ieee" if dtype == torch.float32 else "tf32x3"


_SUM_SPLITS, _SUM_BLOCK = 16, 128


@triton.jit(do_not_specialize=["splits", "units", "columns"])
def _sum_splits_kernel(
    partials, scale, total, splits, units, columns, UNIT: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    size = units * UNIT
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((SPLITS, BLOCK), tl.float32)
    for block in tl.range(0, tl.cdiv(splits, SPLITS), num_stages=STAGES):
        s = block * SPLITS + tl.arange(0, SPLITS)
        offsets = tl.cast(s, tl.int64)[:, None] * size + e[None, :]
        acc += tl.load(partials + offsets, mask=(s < splits)[:, None] & (e < size)[None, :], other=0.0)
    result = tl.sum(acc, 0)
    if scale is not None:
        result *= tl.load(scale + e // columns, mask=e < size, other=0.0)
    tl.store(total + e, result, mask=e < size)


def sum_splits(partials: Tensor, scale: Tensor | None = None) -> Tensor:
    """The sum of partials `[splits, rows, columns]` over its first dimension, in a fixed order; with `scale` `[rows]`
    each row times its own.
    """
    total = torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)
    size = total.numel()
    with on_device(partials.device):
        _sum_splits_kernel[(ceil_div(size, _SUM_BLOCK),)](
            partials,
            scale,
            total,
            partials.shape[0],
            *units(size),
            partials.shape[-1],
            *unit(size),
            _SUM_SPLITS,
            _SUM_BLOCK,
            3,
            num_warps=4,
        )
    return total


def split_count(steps: int, tiles: int, programs: int, least: int = 1) -> int:
    """Into how many programs each of `tiles` is split along `steps`: as many as fill `programs`, at least `least`.

    Depends on shapes and part alone, as the order of sums does.
    """
    return max(1, min(steps, max(least, programs // tiles)))
