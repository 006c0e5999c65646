"""Boxes of pixels: what a program of a spatial convolution loads and stores.

A box is `[images, rows, columns, channels]` of a tensor `[N, H, W, C]`, a tile `[pixels, channels]` to the kernel. It
may begin and end outside of the image: what is outside reads as zero and is not written, so the padding of a
convolution needs no arithmetic. Where TMA takes the tensor a box is one load; else it is pointers and a mask.

With a step of 2 a box takes every second row and column: the pixels that a conv of stride 2 reads for one tap, or those
that its dgrad writes for one parity. For TMA even sizes are a view `[N, H/2, 2, W/2, 2*C]`, in which the parity of the
row is an index and that of the column an offset among the channels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import ceil_div

_TOLERATED = 1.5


class Box(NamedTuple):
    """How many images, rows and columns; powers of two."""

    images: int
    rows: int
    columns: int

    def tiles(self, n: int, h: int, w: int) -> int:
        """How many boxes cover `[n, h, w]` pixels."""
        return ceil_div(n, self.images) * ceil_div(h, self.rows) * ceil_div(w, self.columns)

    def part(self, parts: int) -> Box:
        """The box of an equal part of its pixels, in their order; `parts` is a power of two."""
        images, rows, columns = self
        for _ in range(parts.bit_length() - 1):
            if images > 1:
                images //= 2
            elif rows > 1:
                rows //= 2
            else:
                columns //= 2
        return Box(images, rows, columns)

    def constants(self, prefix: str = "") -> dict[str, int]:
        """As a kernel takes it."""
        return {f"{prefix}{name.upper()}": size for name, size in self._asdict().items()}


@functools.lru_cache(maxsize=4096)
def choose_box(pixels: int, n: int, h: int, w: int) -> Box:
    """The box of this many pixels that covers `[n, h, w]` by the fewest.

    For many images that is one that divides h and w, over more images the smaller the maps are. It is kept for fewer
    images too as long as it needs at most half as many boxes again as the best, so that the smaller last batch of an
    epoch compiles nothing unless it is far smaller.
    """
    sizes = [1 << i for i in range(pixels.bit_length())]
    boxes = [Box(pixels // (r * c), r, c) for r in sizes for c in sizes if r * c <= pixels]

    def covered(box: Box) -> int:
        return ceil_div(h, box.rows) * box.rows * ceil_div(w, box.columns) * box.columns

    def compact(box: Box) -> tuple[int, ...]:
        return box.images, box.rows + box.columns, box.rows

    for_many = min(boxes, key=lambda box: (covered(box), *compact(box)))
    for_these = min(boxes, key=lambda box: (box.tiles(n, h, w), *compact(box)))
    return for_many if for_many.tiles(n, h, w) <= _TOLERATED * for_these.tiles(n, h, w) else for_these


def steps_by_tma(t: Tensor, step: int, channels: int) -> bool:
    """Whether TMA takes boxes of this step and this many channels: those of a step of 2 reach into the next column's
    channels where they do not end with this one's.
    """
    _, h, w, c = t.shape
    return step == 1 or (h % 2 == 0 and w % 2 == 0 and c % channels == 0)


def box_operand(t: Tensor | None, box: Box, channels: int, step: int, tma: bool) -> Tensor | TensorDescriptor | None:
    """Dense t `[N, H, W, C]` as a kernel takes it: a descriptor of boxes of this size, or the tensor itself."""
    if t is None or not tma:
        return t
    n, h, w, c = t.shape
    if step == 1:
        return TensorDescriptor(t, [n, h, w, c], [h * w * c, w * c, c, 1], [*box, channels])
    shape, strides = [n, h // 2, 2, w // 2, 2 * c], [h * w * c, 2 * w * c, w * c, 2 * c, 1]
    return TensorDescriptor(t, shape, strides, [box.images, box.rows, 1, box.columns, channels])


@triton.jit
def box_at(tile, h_count, w_count, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the box with this number begins, of those that cover h_count rows and w_count columns."""
    across = tl.cdiv(w_count, COLUMNS)
    down = tl.cdiv(h_count, ROWS)
    return tile // (across * down) * IMAGES, tile // across % down * ROWS, tile % across * COLUMNS


@triton.jit
def box_pixels(n, h, w, STEP: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, row and column of each pixel of the box at (n, h, w)."""
    pixel = tl.arange(0, IMAGES * ROWS * COLUMNS)
    return n + pixel // (ROWS * COLUMNS), h + pixel // COLUMNS % ROWS * STEP, w + pixel % COLUMNS * STEP


@triton.jit
def inside(n, h, w, N, H, W, STEP: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which pixels of the box at (n, h, w) `[N, H, W]` has."""
    image, row, column = box_pixels(n, h, w, STEP, IMAGES, ROWS, COLUMNS)
    return (image < N) & (row >= 0) & (row < H) & (column >= 0) & (column < W)


@triton.jit
def _pointers(t, n, h, w, c, N, H, W, C, STEP, IMAGES, ROWS, COLUMNS, CHANNELS: tl.constexpr):
    image, row, column = box_pixels(n, h, w, STEP, IMAGES, ROWS, COLUMNS)
    channels = c + tl.arange(0, CHANNELS)
    present = inside(n, h, w, N, H, W, STEP, IMAGES, ROWS, COLUMNS)
    pixels = (tl.cast(image, tl.int64) * H + row) * W + column
    return t + pixels[:, None] * C + channels[None, :], present[:, None] & (channels < C)[None, :]


@triton.jit
def load_box(
    t, n, h, w, c, N, H, W, C, STEP: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The box of t `[N, H, W, C]` at (n, h, w, c) as `[pixels, channels]`; zero outside."""
    PIXELS: tl.constexpr = IMAGES * ROWS * COLUMNS
    if not TMA:
        pointers, present = _pointers(t, n, h, w, c, N, H, W, C, STEP, IMAGES, ROWS, COLUMNS, CHANNELS)
        tile = tl.load(pointers, mask=present, other=0.0)
    elif STEP == 1:
        tile = t.load([n, h, w, c]).reshape(PIXELS, CHANNELS)
    else:
        # The shift rounds down, so that row -1 is the second one of pair -1.
        tile = t.load([n, h >> 1, h & 1, w >> 1, (w & 1) * C + c]).reshape(PIXELS, CHANNELS)
    return tile


@triton.jit
def store_box(
    t, tile, n, h, w, c, N, H, W, C, STEP: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write `[pixels, channels]` to the box of t at (n, h, w, c), in t's dtype, as far as it lies inside."""
    if not TMA:
        pointers, present = _pointers(t, n, h, w, c, N, H, W, C, STEP, IMAGES, ROWS, COLUMNS, CHANNELS)
        tl.store(pointers, tile.to(t.dtype.element_ty), mask=present)
    elif STEP == 1:
        t.store([n, h, w, c], tile.to(t.dtype).reshape(IMAGES, ROWS, COLUMNS, CHANNELS))
    else:
        at = [n, h >> 1, h & 1, w >> 1, (w & 1) * C + c]
        t.store(at, tile.to(t.dtype).reshape(IMAGES, ROWS, 1, COLUMNS, CHANNELS))


@triton.jit
def part_at(n, h, w, STEP: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the part of the box at (n, h, w) begins whose first pixel has the number FIRST."""
    return n + FIRST // (ROWS * COLUMNS), h + FIRST // COLUMNS % ROWS * STEP, w + FIRST % COLUMNS * STEP
