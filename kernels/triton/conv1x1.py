"""1x1 convolutions: forward with statistics, and a backward that forms dy as it loads.

    conv1x1        y = x_s W^T and the Welford partials of y; x may be relu(scale*x + shift), formed on load
    conv1x1_dgrad  dx = dy W (+ residual, masked by the ReLU that gave x), dy = scale*(g + b*y + c) formed on load
    conv1x1_wgrad  dW = dy^T x_s, likewise
    conv1x1_bwd    both in one pass over x, g and y, in 16-bit dtypes and for 128 output channels at most

`fastres.kernels.reference.conv1x1` defines every form. Layout: dense `[N, H, W, C]` seen as `[M, C]`, any M and any
channel counts; float32, float16 or bfloat16 in memory, float32 in accumulators, vectors and weight gradients.

Bytes moved: every operand and result once, weights and vectors aside, as long as a tile holds all output channels;
else the pixels' operand again for each block of them, out of L2: programs with neighbouring numbers share their pixels.
A wgrad writes and reads partial sums of its splits besides, in float32.

Backward as an affine map: dy = scale*(g + b*y + c). A wgrad leaves scale to the rows of dW; the one pass puts it into
the weights that stay in the program.

Not used for float64 (the reference serves it), on CPUs, and below compute capability 8.0. float32 multiplies without
TF32, on the cores for scalars: the library is faster where TF32 is allowed.

Deterministic: splits depend on shapes, dtype and part only, and are added in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.batch_norm import ChannelStats, channel_stats
from ..reference.conv1x1 import ONE_PASS_CHANNELS
from ..reference.conv2d import Pair
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
    load_pixels,
    load_tile,
    merge_statistics,
    operand,
    part,
    split_count,
    store_pixels,
    store_statistics,
    store_tile,
    strided_size,
    sum_splits,
    unit,
    units,
)

# By output channels of the forward pass (conv1x1, conv1x1_wgrad, conv1x1_bwd) or by those of dx (conv1x1_dgrad). Layers
# of few channels are bound by memory: there several programs fit on an SM, and hide one another's latency.
_HOPPER = {
    "conv1x1": {
        64: (Tile(128, 64, 64, 1, 4, 3), Tile(64, 64, 64, 1, 8, 3)),
        128: (Tile(256, 128, 64, 4, 8, 4), Tile(128, 128, 64, 2, 8, 2)),
    },
    "conv1x1, BN + ReLU on load": {
        64: (Tile(128, 64, 64, 1, 4, 3), Tile(64, 64, 64, 1, 4, 3)),
        128: (Tile(128, 128, 64, 2, 8, 3), Tile(128, 128, 64, 2, 8, 2)),
    },
    "conv1x1_dgrad": {
        64: (Tile(128, 64, 64, 1, 4, 3), Tile(64, 64, 64, 1, 4, 3)),
        256: (Tile(128, 256, 64, 2, 8, 3), Tile(128, 128, 64, 2, 8, 2)),
    },
    "conv1x1_wgrad": {
        64: (Tile(64, 128, 64, 1, 4, 3), Tile(64, 64, 64, 1, 4, 3)),
        128: (Tile(128, 256, 64, 1, 8, 3), Tile(128, 128, 64, 1, 8, 2)),
    },
    "conv1x1_bwd": {
        64: (Tile(64, 128, 64, 1, 4, 2), Tile(64, 64, 64, 1, 4, 2)),
        128: (Tile(64, 128, 128, 1, 8, 2), Tile(64, 64, 128, 1, 8, 2)),
    },
}
_AMPERE = {
    "conv1x1": {
        64: (Tile(128, 64, 64, 1, 4, 4), Tile(64, 64, 32, 1, 8, 3)),
        128: (Tile(128, 128, 32, 2, 8, 4), Tile(64, 128, 32, 1, 8, 3)),
    },
    "conv1x1, BN + ReLU on load": {
        64: (Tile(128, 64, 64, 1, 4, 3), Tile(128, 64, 32, 1, 4, 3)),
        128: (Tile(128, 128, 64, 2, 8, 3), Tile(128, 128, 32, 2, 8, 3)),
    },
    "conv1x1_dgrad": {
        64: (Tile(128, 64, 64, 1, 4, 3), Tile(128, 64, 32, 1, 4, 3)),
        256: (Tile(128, 128, 64, 1, 8, 3), Tile(64, 128, 32, 1, 8, 3)),
    },
    "conv1x1_wgrad": {
        64: (Tile(64, 128, 64, 1, 8, 3), Tile(64, 64, 32, 1, 4, 3)),
        128: (Tile(128, 128, 64, 1, 8, 3), Tile(128, 128, 32, 1, 8, 3)),
    },
    "conv1x1_bwd": {
        64: (Tile(64, 64, 64, 1, 4, 2), Tile(64, 32, 64, 1, 4, 2)),
        128: (Tile(64, 64, 128, 1, 8, 2), Tile(32, 64, 128, 1, 8, 2)),
    },
}
# What spills there, in smaller tiles.
_BLACKWELL = _HOPPER | {
    "conv1x1_bwd": {
        64: _HOPPER["conv1x1_bwd"][64],
        128: (Tile(64, 64, 128, 1, 8, 2), Tile(64, 32, 128, 1, 8, 2)),
    }
}
CONFIGS = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}
"""By part, form and width."""

_SIZES = ["M", "c_units", "k_units", "H", "W", "HO", "WO"]


@triton.jit(do_not_specialize=_SIZES)
def _conv1x1_fprop_kernel(
    x, weight, bn, y, count, mean, m2, M, c_units, k_units, H, W, HO, WO,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr, STATS: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = c_units * C_UNIT
    K = k_units * K_UNIT
    blocks = tl.cdiv(K, CHANNELS)
    tile = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * CHANNELS
    row = tile * PIXELS
    acc = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in tl.range(0, tl.cdiv(C, DEPTH), num_stages=STAGES):
        c = step * DEPTH
        a = load_pixels(x, row, c, M, C, H, W, HO, WO, STRIDE, PIXELS, DEPTH, TMA)
        if bn is not None:
            a = activation(a, bn, c + tl.arange(0, DEPTH), C)
        acc = tl.dot(load_tile(weight, k, c, K, C, CHANNELS, DEPTH, TMA), a.T, acc, input_precision="ieee")
    PART: tl.constexpr = PIXELS // PARTS
    seen = 0.0
    tile_mean = tl.zeros((CHANNELS,), tl.float32)
    tile_m2 = tl.zeros((CHANNELS,), tl.float32)
    for index in tl.static_range(PARTS):
        first = row + index * PART
        rounded = part(acc, index, PARTS).to(y.dtype if TMA else y.dtype.element_ty)
        if STATS:
            live = tl.arange(0, PART) < M - first
            rows = tl.minimum(tl.maximum(M - first, 0), PART).to(tl.float32)
            seen, tile_mean, tile_m2 = merge_statistics(rounded, live, rows, seen, tile_mean, tile_m2)
        store_tile(y, rounded.T, first, k, M, K, PART, CHANNELS, TMA)
    if STATS:
        store_statistics(count, mean, m2, tile, seen, tile_mean, tile_m2, k, K, CHANNELS)


@triton.jit
def _unscaled(g, y, grad, k, K):
    """dy/scale = g + b*y + c of tiles `[pixels, channels k]`, in float32."""
    # fma, on vectors broadcast before: a product and a sum would be moved behind the conversion to an operand's layout,
    # where each vector takes registers of its own.
    slope = tl.broadcast_to(row_vector(grad, 2, k, K)[None, :], g.shape)
    offset = tl.broadcast_to(row_vector(grad, 3, k, K)[None, :], g.shape)
    return g.to(tl.float32) + tl.fma(y.to(tl.float32), slope, offset)


@triton.jit(do_not_specialize=_SIZES)
def _conv1x1_dgrad_kernel(
    g, y, bn, grad, weight, residual, mask, dx, M, c_units, k_units, H, W, HO, WO,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = c_units * C_UNIT
    K = k_units * K_UNIT
    blocks = tl.cdiv(C, CHANNELS)
    row = tl.program_id(0) // blocks * PIXELS
    first = tl.program_id(0) % blocks * CHANNELS
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for step in tl.range(0, tl.cdiv(K, DEPTH), num_stages=STAGES):
        k = step * DEPTH
        dy = load_tile(g, row, k, M, K, PIXELS, DEPTH, TMA)
        if bn is not None:
            channels = k + tl.arange(0, DEPTH)
            value = dy.to(tl.float32)
            if y is not None:
                value = _unscaled(dy, load_tile(y, row, k, M, K, PIXELS, DEPTH, TMA), grad, channels, K)
            dy = (value * row_vector(bn, 2, channels, K)[None, :]).to(dy.dtype)
        acc = tl.dot(dy, load_tile(weight, k, first, K, C, DEPTH, CHANNELS, TMA), acc, input_precision="ieee")
    PART: tl.constexpr = CHANNELS // PARTS
    for index in tl.static_range(PARTS):
        c = first + index * PART
        result = part(acc, index, PARTS)
        if residual is not None:
            result += load_pixels(residual, row, c, M, C, H, W, HO, WO, STRIDE, PIXELS, PART, TMA).to(tl.float32)
        if mask is not None:
            z = load_pixels(mask, row, c, M, C, H, W, HO, WO, STRIDE, PIXELS, PART, TMA)
            result = tl.where(z <= 0, 0.0, result)
        store_pixels(dx, result, row, c, M, C, H, W, HO, WO, STRIDE, PIXELS, PART, TMA)


@triton.jit(do_not_specialize=[*_SIZES, "splits"])
def _conv1x1_wgrad_kernel(
    x, g, y, grad, partials, M, c_units, k_units, H, W, HO, WO, splits,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = c_units * C_UNIT
    K = k_units * K_UNIT
    c_blocks = tl.cdiv(C, CHANNELS)
    tiles = c_blocks * tl.cdiv(K, PIXELS)
    split = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles // c_blocks * PIXELS
    c = tl.program_id(0) % c_blocks * CHANNELS
    channels = k + tl.arange(0, PIXELS)
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for step in tl.range(split, tl.cdiv(M, DEPTH), splits, num_stages=STAGES):
        row = step * DEPTH
        dy = load_tile(g, row, k, M, K, DEPTH, PIXELS, TMA)
        if y is not None:
            # Past the last row dy is c, and x is zero.
            dy = _unscaled(dy, load_tile(y, row, k, M, K, DEPTH, PIXELS, TMA), grad, channels, K).to(dy.dtype)
        a = load_pixels(x, row, c, M, C, H, W, HO, WO, STRIDE, DEPTH, CHANNELS, TMA)
        acc = tl.dot(dy.T, a, acc, input_precision="ieee")
    store_tile(partials + tl.cast(split, tl.int64) * K * C, acc, k, c, K, C, PIXELS, CHANNELS, False)


@triton.jit(do_not_specialize=["M", "c_units", "k_units", "splits"])
def _conv1x1_bwd_kernel(
    x, g, y, bn, grad, weight, residual, dx, partials, M, c_units, k_units, splits,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = c_units * C_UNIT
    K = k_units * K_UNIT
    blocks = tl.cdiv(C, CHANNELS)
    split = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS
    channels = tl.arange(0, DEPTH)
    if TMA:
        w = weight.load([0, c])
    else:
        columns = c + tl.arange(0, CHANNELS)
        inside = (channels < K)[:, None] & (columns < C)[None, :]
        w = tl.load(weight + tl.cast(channels, tl.int64)[:, None] * C + columns[None, :], mask=inside, other=0.0)
    if bn is not None:
        w = (w.to(tl.float32) * row_vector(bn, 2, channels, K)[:, None]).to(w.dtype)
    acc = tl.zeros((DEPTH, CHANNELS), tl.float32)
    for step in tl.range(split, tl.cdiv(M, PIXELS), splits, num_stages=STAGES):
        row = step * PIXELS
        dy = load_tile(g, row, 0, M, K, PIXELS, DEPTH, TMA)
        if y is not None:
            dy = _unscaled(dy, load_tile(y, row, 0, M, K, PIXELS, DEPTH, TMA), grad, channels, K).to(dy.dtype)
        a = load_tile(x, row, c, M, C, PIXELS, CHANNELS, TMA)
        result = tl.dot(dy, w, input_precision="ieee")
        acc = tl.dot(dy.T, a, acc, input_precision="ieee")
        if residual is not None:
            result += load_tile(residual, row, c, M, C, PIXELS, CHANNELS, TMA).to(tl.float32)
        if MASK:
            result = tl.where(a <= 0, 0.0, result)
        store_tile(dx, result, row, c, M, C, PIXELS, CHANNELS, TMA)
    store_tile(partials + tl.cast(split, tl.int64) * K * C, acc, 0, c, K, C, DEPTH, CHANNELS, False)


def _check_raw(kernel: str, g: Tensor, y: Tensor | None, bn: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """y as it is needed: None where statistics are constant. Raises for vectors that do not fit."""
    check_activations(kernel, g=g, y=y)
    check_vectors(kernel, g, bn=bn, grad=grad)
    if bn is None and (y is not None or grad is not None):
        raise ValueError(f"{kernel}: y and grad belong to bn: pass it too, or neither")
    return None if grad is None else y


def conv1x1(
    x: Tensor, weight: Tensor, stride: int = 1, with_stats: bool = True, bn: Tensor | None = None
) -> tuple[Tensor, ChannelStats | None]:
    """y = x_s W^T and its statistics, a group for each tile of pixels; reads x, writes y. See the reference.

    Raises TypeError for a dtype that Triton kernels do not take, ValueError for memory that is not dense and for shapes
    and devices that do not fit.
    """
    check_activations("conv1x1", x=x)
    k, c = weight.shape
    check_dense("conv1x1", (k, x.shape[-1]), (x.dtype,), x.device, weight=weight)
    check_vectors("conv1x1", x, bn=bn)
    n, h, w, _ = x.shape
    ho, wo = strided_size(h, stride), strided_size(w, stride)
    y = torch.empty(n, ho, wo, k, dtype=x.dtype, device=x.device)
    rows = n * ho * wo
    if y.numel() == 0:
        return y, channel_stats(y) if with_stats else None
    tma = has_tma(part_of(x.device), x, weight, y)

    def launch(tile: Tile):
        tiles = ceil_div(rows, tile.pixels)
        stats = empty_stats(tiles, k, x.device) if with_stats else None
        compiled = _conv1x1_fprop_kernel[(tiles * ceil_div(k, tile.channels),)](
            operand(x, tile.pixels, tile.depth, tma and stride == 1),
            operand(weight, tile.channels, tile.depth, tma),
            bn,
            operand(y, tile.pixels // tile.parts, tile.channels, tma),
            *(stats or (None, None, None)),
            rows,
            *units(c, k),
            *(h, w, ho, wo),
            *unit(c, k),
            with_stats,
            stride,
            tma,
            **tile.constants,
        )
        return stats, compiled

    form = "conv1x1" if bn is None else "conv1x1, BN + ReLU on load"
    return y, choose(form, choices(CONFIGS, form, x, k, tma), x, launch)


def conv1x1_dgrad(
    g: Tensor,
    weight: Tensor,
    input_hw: Pair,
    stride: int = 1,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    keep_residual: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """dx = dy W (+ residual, masked); reads g (y, residual, mask), writes dx into residual's memory where there is
    one and it may. See the reference.

    Raises as `conv1x1` does.
    """
    kernel = "conv1x1_dgrad"
    y = _check_raw(kernel, g, y, bn, grad)
    k, c = weight.shape
    check_dense(kernel, (g.shape[-1], c), (g.dtype,), g.device, weight=weight)
    shape = (g.shape[0], *input_hw, c)
    check_dense(kernel, shape, (g.dtype,), g.device, residual=residual, mask=mask)
    n, h, w, _ = shape
    dx = residual
    if dx is not None and keep_residual:
        dx = torch.empty_like(residual) if stride == 1 else residual.clone()
    if dx is None:
        make = torch.empty if stride == 1 else torch.zeros
        dx = make(shape, dtype=g.dtype, device=g.device)
    elif mask is not None and stride != 1:
        dx.masked_fill_(mask <= 0, 0)  # the pixels that no program visits
    check_strided(kernel, "dx", dx, "g", g, stride)
    rows = g.shape[:3].numel()
    if rows == 0 or c == 0:
        return dx
    tma = has_tma(part_of(g.device), g, y, weight, dx, mask)

    def launch(tile: Tile):
        pixels, part_channels = tile.pixels, tile.channels // tile.parts
        of_dx = tma and stride == 1
        compiled = _conv1x1_dgrad_kernel[(ceil_div(rows, pixels) * ceil_div(c, tile.channels),)](
            operand(g, pixels, tile.depth, tma),
            operand(y, pixels, tile.depth, tma),
            bn,
            grad,
            operand(weight, tile.depth, tile.channels, tma),
            operand(residual, pixels, part_channels, of_dx),
            operand(mask, pixels, part_channels, of_dx),
            operand(dx, pixels, part_channels, of_dx),
            rows,
            *units(c, k),
            *(h, w, *g.shape[1:3]),
            *unit(c, k),
            stride,
            tma,
            **tile.constants,
        )
        return dx, compiled

    return choose(kernel, choices(CONFIGS, kernel, g, c, tma), g, launch)


def conv1x1_wgrad(
    x: Tensor,
    g: Tensor,
    stride: int = 1,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """dW `[K, C]` in float32; reads x, g (y), writes partial sums and adds them up in a second launch. See the
    reference.

    Raises as `conv1x1` does.
    """
    kernel = "conv1x1_wgrad"
    y = _check_raw(kernel, g, y, bn, grad)
    check_strided(kernel, "x", x, "g", g, stride)
    k, c = g.shape[-1], x.shape[-1]
    rows = g.shape[:3].numel()
    if rows == 0:
        return torch.zeros(k, c, dtype=torch.float32, device=g.device)
    part = part_of(g.device)
    tma = has_tma(part, g, y, x)

    def launch(tile: Tile):
        tiles = ceil_div(k, tile.pixels) * ceil_div(c, tile.channels)
        splits = split_count(ceil_div(rows, tile.depth), tiles, MULTIPROCESSORS[part])
        partials = torch.empty(splits, k, c, dtype=torch.float32, device=g.device)
        compiled = _conv1x1_wgrad_kernel[(tiles * splits,)](
            operand(x, tile.depth, tile.channels, tma and stride == 1),
            operand(g, tile.depth, tile.pixels, tma),
            operand(y, tile.depth, tile.pixels, tma),
            grad,
            partials,
            rows,
            *units(c, k),
            *(*x.shape[1:3], *g.shape[1:3]),
            splits,
            *unit(c, k),
            stride,
            tma,
            **tile.constants,
        )
        return partials, compiled

    partials = choose(kernel, choices(CONFIGS, kernel, g, k, tma), g, launch)
    return sum_splits(partials, None if bn is None else bn[2])


def conv1x1_bwd(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    keep_residual: bool = False,
    mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx and dW; reads x, g (y, residual), writes dx, into residual's memory where there is one and it may. See the
    reference.

    float32 and more than `ONE_PASS_CHANNELS` output channels, of which no tile holds all, take the two kernels.

    Raises as `conv1x1` does.
    """
    kernel = "conv1x1_bwd"
    y = _check_raw(kernel, g, y, bn, grad)
    check_strided(kernel, "x", x, "g", g, 1)
    k, c = g.shape[-1], x.shape[-1]
    if g.dtype == torch.float32 or k > ONE_PASS_CHANNELS:
        through = {"bn": bn, "grad": grad, "y": y}
        dw = conv1x1_wgrad(x, g, **through)
        through |= {"residual": residual, "keep_residual": keep_residual, "mask": x if mask else None}
        return conv1x1_dgrad(g, weight, x.shape[1:3], **through), dw
    check_dense(kernel, (k, c), (g.dtype,), g.device, weight=weight)
    check_dense(kernel, tuple(x.shape), (g.dtype,), g.device, residual=residual)
    dx = torch.empty_like(x) if residual is None or keep_residual else residual
    rows = g.shape[:3].numel()
    if x.numel() == 0:
        return dx, torch.zeros(k, c, dtype=torch.float32, device=g.device)
    part = part_of(g.device)
    tma = has_tma(part, g, y, x, weight, dx)

    def launch(tile: Tile):
        blocks = ceil_div(c, tile.channels)
        splits = split_count(ceil_div(rows, tile.pixels), blocks, MULTIPROCESSORS[part])
        partials = torch.empty(splits, k, c, dtype=torch.float32, device=g.device)
        compiled = _conv1x1_bwd_kernel[(blocks * splits,)](
            operand(x, tile.pixels, tile.channels, tma),
            operand(g, tile.pixels, tile.depth, tma),
            operand(y, tile.pixels, tile.depth, tma),
            bn,
            grad,
            operand(weight, tile.depth, tile.channels, tma),
            operand(residual, tile.pixels, tile.channels, tma),
            operand(dx, tile.pixels, tile.channels, tma),
            partials,
            rows,
            *units(c, k),
            splits,
            *unit(c, k),
            mask,
            tma,
            **tile.constants,
        )
        return partials, compiled

    partials = choose(kernel, choices(CONFIGS, kernel, g, k, tma), g, launch)
    return dx, sum_splits(partials, None if bn is None else bn[2])
