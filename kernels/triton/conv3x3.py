"""3x3 convolutions, padding = dilation: implicit GEMMs over boxes of pixels.

    conv3x3        y = conv(x) and the Welford partials of y
    conv3x3_dgrad  dx, in front of a batch norm masked by its ReLU and with its two sums; or plus a residual, masked
    conv3x3_wgrad  dW; the conv's input may be relu(scale*x + shift), formed on load

`fastres.kernels.reference.conv3x3` defines every form. Layout: dense `[N, H, W, C]`, any sizes and channel counts;
float32, float16 or bfloat16 in memory, float32 in accumulators, vectors and weight gradients. Weights `[K, C, 3, 3]`
are read in channels_last memory, `[K, 3, 3, C]`; others are copied first.

A tap of the kernel is a box of pixels, moved by a row or a column; where it leaves the image it reads zeros, which are
the padding (`_boxes.py`). So the inner dimension of the product is nine times the channels, and no activation is ever
unfolded in memory. Stride 2 takes every second pixel in a box. Its dgrad is four products, one for each parity of row
and column, of the four, two, two and one taps that reach such pixels; the programs with most taps start first.

In wgrad the activation stays, and the gradient moves: what BN + ReLU forms on load is formed once for all the taps that
a program has (`Tile.parts` accumulators); only boxes that reach over an image's edge have to be masked for that.

Bytes moved: every operand and result once. In fprop and dgrad each box is read nine times, and again for each block of
channels, out of L2: programs with neighbouring numbers share their pixels, and their weights too. A wgrad writes and
reads partial sums of its splits besides, in float32.

Not used for float64 (the reference serves it), on CPUs, and below compute capability 8.0. Groups, and a stride of 2
with dilation, are the library's, with Triton's passes around. float32 multiplies without TF32, on the cores for
scalars: the library is faster where TF32 is allowed.

Deterministic: splits depend on shapes, dtype and part only, and are added in their order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import conv3x3 as library_conv3x3
from ..library import conv3x3_dgrad as library_conv3x3_dgrad
from ..library import conv3x3_wgrad as library_conv3x3_wgrad
from ..reference.batch_norm import ChannelStats, channel_stats
from ..reference.conv2d import Pair
from ..reference.conv3x3 import in_boxes
from . import batch_norm
from ._boxes import box_at, box_operand, choose_box, inside, load_box, part_at, steps_by_tma, store_box
from ._common import (
    MULTIPROCESSORS,
    ceil_div,
    check_activations,
    check_dense,
    check_vectors,
    empty_stats,
    part_of,
    row_vector,
)
from ._gemm import (
    Tile,
    activation,
    check_strided,
    choices,
    choose,
    has_tma,
    load_tile,
    merge_statistics,
    operand,
    part,
    store_statistics,
    strided_size,
    sum_splits,
    unit,
    units,
)

# By output channels of the forward pass (conv3x3, conv3x3_wgrad) or by those of dx (conv3x3_dgrad). In a wgrad `pixels`
# are output channels, `depth` is pixels, and `parts` the taps that share an activation.
_HOPPER = {
    "conv3x3": {
        64: (Tile(256, 64, 64, 4, 8, 4), Tile(128, 64, 64, 2, 8, 3)),
        128: (Tile(256, 128, 64, 4, 8, 4), Tile(128, 128, 64, 2, 8, 2)),
    },
    "conv3x3_dgrad": {
        64: (Tile(256, 64, 64, 4, 8, 4), Tile(128, 64, 64, 2, 8, 3)),
        128: (Tile(256, 128, 64, 4, 8, 4), Tile(128, 128, 64, 2, 8, 2)),
    },
    "conv3x3_wgrad": {
        64: (Tile(64, 64, 64, 9, 8, 2), Tile(64, 64, 64, 3, 4, 2)),
        128: (Tile(64, 128, 64, 3, 8, 3), Tile(128, 128, 64, 1, 8, 2)),
        256: (Tile(256, 128, 64, 1, 8, 3), Tile(128, 128, 64, 1, 8, 2)),
    },
    "conv3x3_wgrad, stride 2": {
        64: (Tile(64, 64, 64, 1, 4, 3), Tile(64, 64, 64, 1, 4, 2)),
        128: (Tile(128, 128, 64, 1, 8, 3), Tile(128, 128, 64, 1, 8, 2)),
    },
}
_AMPERE = {
    "conv3x3": {
        64: (Tile(128, 64, 32, 2, 4, 4), Tile(64, 64, 32, 1, 8, 3)),
        128: (Tile(128, 128, 32, 2, 8, 4), Tile(64, 128, 32, 2, 8, 3)),
    },
    "conv3x3_dgrad": {
        64: (Tile(128, 64, 32, 2, 4, 4), Tile(64, 64, 32, 1, 4, 3)),
        128: (Tile(128, 128, 32, 2, 8, 4), Tile(64, 128, 32, 1, 8, 3)),
    },
    "conv3x3_wgrad": {
        64: (Tile(64, 64, 64, 1, 4, 3), Tile(64, 64, 32, 1, 4, 3)),
        128: (Tile(128, 128, 64, 1, 8, 3), Tile(128, 128, 32, 1, 8, 3)),
    },
}
_AMPERE["conv3x3_wgrad, stride 2"] = _AMPERE["conv3x3_wgrad"]
# Triton 3.6 does not compile several accumulators there; and what spills, in smaller tiles.
_BLACKWELL = _HOPPER | {
    "conv3x3": {
        64: _HOPPER["conv3x3"][64],
        128: (Tile(128, 128, 64, 2, 8, 4), Tile(128, 128, 64, 2, 8, 2)),
    },
    "conv3x3_dgrad": {
        64: (Tile(128, 64, 64, 2, 8, 4), Tile(64, 64, 64, 1, 8, 3)),
        128: _HOPPER["conv3x3_dgrad"][128],
    },
    "conv3x3_wgrad": {
        64: (Tile(64, 64, 64, 1, 4, 3), Tile(64, 64, 64, 1, 4, 2)),
        128: (Tile(128, 128, 64, 1, 8, 3), Tile(128, 128, 64, 1, 8, 2)),
        256: _HOPPER["conv3x3_wgrad"][256],
    },
}
CONFIGS = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}
"""By part, form and width."""

_FLOAT32_WGRAD = (Tile(64, 64, 16, 1, 8, 3), Tile(64, 32, 16, 1, 4, 2))
_MOST_SPLITS = 12
"""Of a wgrad with many tiles: each split's partial sums are as large as the weights, in float32."""

_SIZES = ["N", "H", "W", "HO", "WO", "c_units", "k_units", "dilation"]


@triton.jit(do_not_specialize=_SIZES)
def _conv3x3_fprop_kernel(
    x, weight, y, count, mean, m2, N, H, W, HO, WO, c_units, k_units, dilation,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr, STATS: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    TMA_X: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PART_IMAGES: tl.constexpr, PART_ROWS: tl.constexpr, PART_COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = c_units * C_UNIT
    K = k_units * K_UNIT
    blocks = tl.cdiv(K, CHANNELS)
    tile = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * CHANNELS
    n, h, w = box_at(tile, HO, WO, IMAGES, ROWS, COLUMNS)
    steps = tl.cdiv(C, DEPTH)
    acc = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in tl.range(0, 9 * steps, num_stages=STAGES):
        tap = step // steps
        c = step % steps * DEPTH
        row = h * STRIDE + (tap // 3 - 1) * dilation
        column = w * STRIDE + (tap % 3 - 1) * dilation
        a = load_box(x, n, row, column, c, N, H, W, C, STRIDE, TMA_X, IMAGES, ROWS, COLUMNS, DEPTH)
        # Behind the last channel the weights are the next tap's, and the pixels zero.
        weights = load_tile(weight, k, tap * C + c, K, 9 * C, CHANNELS, DEPTH, TMA)
        acc = tl.dot(weights, a.T, acc, input_precision="ieee")
    PART: tl.constexpr = PIXELS // PARTS
    seen = 0.0
    tile_mean = tl.zeros((CHANNELS,), tl.float32)
    tile_m2 = tl.zeros((CHANNELS,), tl.float32)
    for index in tl.static_range(PARTS):
        pn, ph, pw = part_at(n, h, w, 1, index * PART, ROWS, COLUMNS)
        rounded = part(acc, index, PARTS).to(y.dtype if TMA else y.dtype.element_ty)
        if STATS:
            live = inside(pn, ph, pw, N, HO, WO, 1, PART_IMAGES, PART_ROWS, PART_COLUMNS)
            rows = tl.sum(live.to(tl.float32), 0)
            seen, tile_mean, tile_m2 = merge_statistics(rounded, live, rows, seen, tile_mean, tile_m2)
        store_box(
            y, rounded.T, pn, ph, pw, k, N, HO, WO, K, 1, TMA, PART_IMAGES, PART_ROWS, PART_COLUMNS, CHANNELS
        )  # fmt: skip
    if STATS:
        store_statistics(count, mean, m2, tile, seen, tile_mean, tile_m2, k, K, CHANNELS)


@triton.jit(do_not_specialize=_SIZES)
def _conv3x3_dgrad_kernel(
    dy, weight, y, bn, residual, mask, dx, sums, N, H, W, HO, WO, c_units, k_units, dilation,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr, TMA_DX: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PART_IMAGES: tl.constexpr, PART_ROWS: tl.constexpr, PART_COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = c_units * C_UNIT
    K = k_units * K_UNIT
    blocks = tl.cdiv(C, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS
    slot = tl.program_id(0) // blocks
    # Pixels of one parity of row and column: those of odd rows and columns, which most taps reach, come first.
    h_count = tl.cdiv(H, STRIDE)
    w_count = tl.cdiv(W, STRIDE)
    tiles = tl.cdiv(N, IMAGES) * tl.cdiv(h_count, ROWS) * tl.cdiv(w_count, COLUMNS)
    odd_row = 0
    odd_column = 0
    if STRIDE == 2:
        odd_row = 1 - slot // tiles // 2
        odd_column = 1 - slot // tiles % 2
    n, h, w = box_at(slot % tiles, h_count, w_count, IMAGES, ROWS, COLUMNS)
    steps = tl.cdiv(K, DEPTH)
    taps_across = 3 if STRIDE == 1 else 1 + odd_column
    taps = 9 if STRIDE == 1 else (1 + odd_row) * taps_across
    acc = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in tl.range(0, taps * steps, num_stages=STAGES):
        k = step % steps * DEPTH
        tap_row = step // steps // taps_across
        tap_column = step // steps % taps_across
        row = h + (1 - tap_row) * dilation
        column = w + (1 - tap_column) * dilation
        if STRIDE == 2:
            # An odd pixel is reached by taps 0 and 2, an even one by tap 1.
            row = h + odd_row * (1 - tap_row)
            column = w + odd_column * (1 - tap_column)
            tap_row = 1 + odd_row * (2 * tap_row - 1)
            tap_column = 1 + odd_column * (2 * tap_column - 1)
        g = load_box(dy, n, row, column, k, N, HO, WO, K, 1, TMA, IMAGES, ROWS, COLUMNS, DEPTH)
        # Behind the last channel the weights are the next tap's, and nothing of that is stored.
        weights = load_tile(weight, k, (3 * tap_row + tap_column) * C + c, K, 9 * C, DEPTH, CHANNELS, TMA)
        acc = tl.dot(weights.T, g.T, acc, input_precision="ieee")
    PART: tl.constexpr = PIXELS // PARTS
    channels = c + tl.arange(0, CHANNELS)
    total = tl.zeros((CHANNELS,), tl.float32)
    centred = tl.zeros((CHANNELS,), tl.float32)
    for index in tl.static_range(PARTS):
        row = h * STRIDE + odd_row
        column = w * STRIDE + odd_column
        pn, ph, pw = part_at(n, row, column, STRIDE, index * PART, ROWS, COLUMNS)
        value = part(acc, index, PARTS)
        if bn is not None:
            raw = load_box(
                y, pn, ph, pw, c, N, H, W, C, STRIDE, TMA_DX, PART_IMAGES, PART_ROWS, PART_COLUMNS, CHANNELS
            ).T.to(tl.float32)  # fmt: skip
            live = inside(pn, ph, pw, N, H, W, STRIDE, PART_IMAGES, PART_ROWS, PART_COLUMNS)
            scale = tl.broadcast_to(row_vector(bn, 2, channels, C)[:, None], raw.shape)
            shift = tl.broadcast_to(row_vector(bn, 3, channels, C)[:, None], raw.shape)
            stops = (tl.fma(raw, scale, shift) <= 0) | (live == 0)[None, :]
            rounded = tl.where(stops, 0.0, value).to(dx.dtype if TMA_DX else dx.dtype.element_ty)
            value = rounded.to(tl.float32)
            total += tl.sum(value, 1)
            centred += tl.sum(value * (raw - row_vector(bn, 0, channels, C)[:, None]), 1)
        if residual is not None:
            value += load_box(
                residual, pn, ph, pw, c, N, H, W, C, STRIDE, TMA_DX, PART_IMAGES, PART_ROWS, PART_COLUMNS, CHANNELS
            ).T.to(tl.float32)  # fmt: skip
        if mask is not None:
            z = load_box(
                mask, pn, ph, pw, c, N, H, W, C, STRIDE, TMA_DX, PART_IMAGES, PART_ROWS, PART_COLUMNS, CHANNELS
            ).T  # fmt: skip
            value = tl.where(z <= 0, 0.0, value)
        store_box(
            dx, value.to(dx.dtype if TMA_DX else dx.dtype.element_ty).T, pn, ph, pw, c, N, H, W, C, STRIDE, TMA_DX,
            PART_IMAGES, PART_ROWS, PART_COLUMNS, CHANNELS,
        )  # fmt: skip
    if bn is not None:
        at = tl.cast(slot, tl.int64) * 2 * C + channels
        tl.store(sums + at, total, mask=channels < C)
        tl.store(sums + at + C, centred, mask=channels < C)


@triton.jit(do_not_specialize=[*_SIZES, "splits"])
def _conv3x3_wgrad_kernel(
    x, bn, dy, partials, N, H, W, HO, WO, c_units, k_units, dilation, splits,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr, STRIDE: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
    TMA_X: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = c_units * C_UNIT
    K = k_units * K_UNIT
    c_blocks = tl.cdiv(C, CHANNELS)
    k_blocks = tl.cdiv(K, PIXELS)
    # Neighbours have the same pixels.
    c = tl.program_id(0) % c_blocks * CHANNELS
    k = tl.program_id(0) // c_blocks % k_blocks * PIXELS
    first_tap = tl.program_id(0) // (c_blocks * k_blocks) % (9 // PARTS) * PARTS
    split = tl.program_id(0) // (c_blocks * k_blocks * (9 // PARTS))
    h_count = tl.cdiv(H, STRIDE)
    w_count = tl.cdiv(W, STRIDE)
    tiles = tl.cdiv(N, IMAGES) * tl.cdiv(h_count, ROWS) * tl.cdiv(w_count, COLUMNS)
    odd_row = 0
    odd_column = 0
    if STRIDE == 2:
        # Tap 1 reads even rows, taps 0 and 2 odd ones.
        odd_row = (first_tap // 3 + 1) % 2
        odd_column = (first_tap % 3 + 1) % 2
    channels = c + tl.arange(0, CHANNELS)
    accs = (tl.zeros((CHANNELS, PIXELS), tl.float32),) * PARTS
    for tile in tl.range(split, tiles, splits, num_stages=STAGES):
        n, h, w = box_at(tile, h_count, w_count, IMAGES, ROWS, COLUMNS)
        row = h * STRIDE + odd_row
        column = w * STRIDE + odd_column
        a = load_box(x, n, row, column, c, N, H, W, C, STRIDE, TMA_X, IMAGES, ROWS, COLUMNS, CHANNELS)
        if bn is not None:
            a = activation(a, bn, channels, C)
            if RAGGED:
                # relu(shift) outside of the image would meet gradients inside; past the last image there are none.
                live = inside(n, row, column, n + IMAGES, H, W, STRIDE, IMAGES, ROWS, COLUMNS)
                a = tl.where(live[:, None], a, 0.0).to(a.dtype)
        moved = ()
        for index in tl.static_range(PARTS):
            tap = first_tap + index
            to_row = h + (1 - tap // 3) * dilation
            to_column = w + (1 - tap % 3) * dilation
            if STRIDE == 2:
                to_row = h + (tap // 3 == 0).to(tl.int32)
                to_column = w + (tap % 3 == 0).to(tl.int32)
            g = load_box(dy, n, to_row, to_column, k, N, HO, WO, K, 1, TMA, IMAGES, ROWS, COLUMNS, PIXELS)
            moved = moved + (tl.dot(a.T, g, accs[index], input_precision="ieee"),)
        accs = moved
    outputs = k + tl.arange(0, PIXELS)
    rows = (tl.cast(split, tl.int64) * K + outputs) * 9
    present = (outputs < K)[:, None] & (channels < C)[None, :]
    for index in tl.static_range(PARTS):
        at = (rows + first_tap + index)[:, None] * C + channels[None, :]
        tl.store(partials + at, accs[index].T, mask=present)


@functools.lru_cache(maxsize=4096)
def _splits(steps: int, tiles: int, programs: int) -> int:
    """Into how many programs each of `tiles` is split along `steps`, so that of `programs` at a time few are idle at
    the end: tiles are few and large here, and those of `_gemm.split_count` would leave up to half of a GPU without
    work. Depends on shapes and part alone, as the order of sums does.
    """
    most = min(steps, max(_MOST_SPLITS, programs // tiles))
    shares = {splits: ceil_div(tiles * splits, programs) / splits for splits in range(1, most + 1)}
    enough = 1.1 * min(shares.values())
    return next(splits for splits, share in shares.items() if share <= enough)


def _matrix(kernel: str, weight: Tensor, channels: int | None, outputs: int | None, like: Tensor) -> Tensor:
    """Weights `[K, C, 3, 3]` as the dense matrix `[K, 9*C]`, a view of channels_last memory. Raises ValueError."""
    expected = outputs or weight.shape[0], channels or weight.shape[1], 3, 3
    if weight.shape != expected or weight.dtype != like.dtype or weight.device != like.device:
        raise ValueError(
            f"{kernel}: weight must be {like.dtype} {list(expected)} on {like.device}, is {weight.dtype} "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    return weight.permute(0, 2, 3, 1).contiguous().view(weight.shape[0], -1)


def conv3x3(
    x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1, groups: int = 1, with_stats: bool = True
) -> tuple[Tensor, ChannelStats | None]:
    """y = conv(x) and its statistics, a group for each box of pixels; reads x, writes y. See the reference.

    Raises TypeError for a dtype that Triton kernels do not take, ValueError for memory that is not dense and for shapes
    and devices that do not fit.
    """
    kernel = "conv3x3"
    if not in_boxes(stride, dilation, groups):
        return library_conv3x3(x, weight, stride, dilation, groups, with_stats, passes=batch_norm)
    check_activations(kernel, x=x)
    matrix = _matrix(kernel, weight, x.shape[-1], None, x)
    n, h, w, c = x.shape
    ho, wo, k = strided_size(h, stride), strided_size(w, stride), weight.shape[0]
    y = torch.empty(n, ho, wo, k, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, channel_stats(y) if with_stats else None
    tma = has_tma(part_of(x.device), x, matrix, y)

    def launch(tile: Tile):
        box = choose_box(tile.pixels, n, ho, wo)
        part_box, tiles = box.part(tile.parts), box.tiles(n, ho, wo)
        stats = empty_stats(tiles, k, x.device) if with_stats else None
        tma_x = tma and steps_by_tma(x, stride, tile.depth)
        compiled = _conv3x3_fprop_kernel[(tiles * ceil_div(k, tile.channels),)](
            box_operand(x, box, tile.depth, stride, tma_x),
            operand(matrix, tile.channels, tile.depth, tma),
            box_operand(y, part_box, tile.channels, 1, tma),
            *(stats or (None, None, None)),
            *(n, h, w, ho, wo),
            *units(c, k),
            dilation,
            *unit(c, k),
            with_stats,
            stride,
            tma,
            tma_x,
            **box.constants(),
            **part_box.constants("PART_"),
            **tile.constants,
        )
        return stats, compiled

    return y, choose(f"{kernel}, stride {stride}", choices(CONFIGS, kernel, x, k, tma), x, launch)


def conv3x3_dgrad(
    dy: Tensor,
    weight: Tensor,
    input_hw: Pair,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    *,
    y: Tensor | None = None,
    bn: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx and, with y and bn, its sums `[P, 2, C]`; reads dy (y, residual, mask), writes dx. See the reference.

    Raises as `conv3x3` does.
    """
    kernel = "conv3x3_dgrad"
    if (y is None) != (bn is None):
        raise ValueError(f"{kernel}: y and bn describe one batch norm: pass both, or neither")
    if bn is not None and (residual is not None or mask is not None):
        raise ValueError(f"{kernel}: residual and mask are not for a gradient in front of bn: leave them out")
    if not in_boxes(stride, dilation, groups):
        return library_conv3x3_dgrad(
            dy, weight, input_hw, stride, dilation, groups, y=y, bn=bn, residual=residual, mask=mask, passes=batch_norm
        )
    check_activations(kernel, dy=dy)
    matrix = _matrix(kernel, weight, None, dy.shape[-1], dy)
    n, ho, wo, k = dy.shape
    shape = (h, w, c) = (*input_hw, weight.shape[1])
    dx = torch.empty(n, *shape, dtype=dy.dtype, device=dy.device)
    check_dense(kernel, tuple(dx.shape), (dy.dtype,), dy.device, y=y, residual=residual, mask=mask)
    check_vectors(kernel, dx, bn=bn)
    check_strided(kernel, "dx", dx, "dy", dy, stride)
    if dx.numel() == 0:
        return dx, None if bn is None else torch.zeros(1, 2, c, dtype=torch.float32, device=dy.device)
    tma = has_tma(part_of(dy.device), dy, matrix, dx, y, residual, mask)

    def launch(tile: Tile):
        halves = n, ceil_div(h, stride), ceil_div(w, stride)
        box = choose_box(tile.pixels, *halves)
        slots = stride * stride * box.tiles(*halves)
        sums = None if bn is None else torch.empty(slots, 2, c, dtype=torch.float32, device=dy.device)
        tma_dx = tma and steps_by_tma(dx, stride, tile.channels)
        part_box = box.part(tile.parts)
        of_dx = part_box, tile.channels, stride, tma_dx
        compiled = _conv3x3_dgrad_kernel[(slots * ceil_div(c, tile.channels),)](
            box_operand(dy, box, tile.depth, 1, tma),
            operand(matrix, tile.depth, tile.channels, tma),
            box_operand(y, *of_dx),
            bn,
            box_operand(residual, *of_dx),
            box_operand(mask, *of_dx),
            box_operand(dx, *of_dx),
            sums,
            *(n, h, w, ho, wo),
            *units(c, k),
            dilation,
            *unit(c, k),
            stride,
            tma,
            tma_dx,
            **box.constants(),
            **part_box.constants("PART_"),
            **tile.constants,
        )
        return (dx, sums), compiled

    return choose(f"{kernel}, stride {stride}", choices(CONFIGS, kernel, dy, c, tma), dy, launch)


def conv3x3_wgrad(
    x: Tensor, dy: Tensor, stride: int = 1, dilation: int = 1, groups: int = 1, bn: Tensor | None = None
) -> Tensor:
    """dW `[K, C, 3, 3]` in float32, in channels_last memory; reads x and dy, writes partial sums and adds them up in a
    second launch. See the reference.

    Raises as `conv3x3` does.
    """
    kernel = "conv3x3_wgrad"
    if not in_boxes(stride, dilation, groups):
        return library_conv3x3_wgrad(x, dy, stride, dilation, groups, bn, passes=batch_norm)
    check_activations(kernel, x=x)
    check_activations(kernel, dy=dy)
    check_strided(kernel, "x", x, "dy", dy, stride)
    check_vectors(kernel, x, bn=bn)
    n, h, w, c = x.shape
    _, ho, wo, k = dy.shape
    if dy.numel() == 0 or c == 0:
        return torch.zeros(k, 3, 3, c, dtype=torch.float32, device=x.device).permute(0, 3, 1, 2)
    part = part_of(x.device)
    tma = has_tma(part, x, dy)

    def launch(tile: Tile):
        halves = n, ceil_div(h, stride), ceil_div(w, stride)
        box = choose_box(tile.depth, *halves)
        ragged = h % (box.rows * stride) != 0 or w % (box.columns * stride) != 0
        tiles = ceil_div(k, tile.pixels) * ceil_div(c, tile.channels) * (9 // tile.parts)
        splits = _splits(box.tiles(*halves), tiles, MULTIPROCESSORS[part])
        partials = torch.empty(splits, k, 9 * c, dtype=torch.float32, device=x.device)
        tma_x = tma and steps_by_tma(x, stride, tile.channels)
        compiled = _conv3x3_wgrad_kernel[(tiles * splits,)](
            box_operand(x, box, tile.channels, stride, tma_x),
            bn,
            box_operand(dy, box, tile.pixels, 1, tma),
            partials,
            *(n, h, w, ho, wo),
            *units(c, k),
            dilation,
            splits,
            *unit(c, k),
            stride,
            ragged,
            tma,
            tma_x,
            **box.constants(),
            **tile.constants,
        )
        return partials, compiled

    form = kernel if stride == 1 else f"{kernel}, stride 2"
    partials = choose(form, choices(CONFIGS, form, x, k, tma, _FLOAT32_WGRAD), x, launch)
    return sum_splits(partials).view(k, 3, 3, c).permute(0, 3, 1, 2)
