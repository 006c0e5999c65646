"""The stem's BN + ReLU + 3x3/2 max-pool (padding 1), forward and backward, each in one pass.

    stem_pool      out = maxpool(relu(scale*y + shift)), y at the maximum, and a byte that says where that is
    stem_pool_bwd  dy = scale*(g' + b*y + c), g' being the sum of the gradients of the windows that chose the pixel

`fastres.kernels.reference.stem` defines both. Layout: dense `[N, H, W, C]`, any sizes; float32, float16 or bfloat16 in
memory, float32 in registers, per-channel vectors `[4, C]` in float32.

Bytes moved: forward reads y once and writes out, y_argmax and argmax; backward reads g and argmax (and y, unless the
statistics are constant) and writes dy. Accesses are 16 bytes wide where C is a multiple of 8 in 16-bit dtypes, of 4 in
float32 (argmax: as many values, a byte each), and go through cp.async a step ahead of their use.

Neighbouring windows share pixels. A program takes a few pooled columns of one block of channels and walks down the
image: the row that the next windows share stays in registers, as the maxima of its three taps (forward) or as the
gradients and codes of its windows (backward). Only the column that neighbours share is loaded twice, in the same step,
so the second time from L2. Columns of all images stand side by side, so that any width fills the tiles, and programs
with neighbouring numbers take neighbouring columns. Image and row offsets are 64-bit.

Not used for float64 (the reference serves it), on CPUs, and below compute capability 8.0.

Sizes are not specialised on: UNIT says what alignment needs, and the smaller last batch of an epoch compiles nothing.

Deterministic: backward gathers, in the order of the reference, and nothing is atomic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.conv2d import Pair
from ..reference.stem import NO_GRADIENT as _NO_GRADIENT
from ._common import (
    MULTIPROCESSORS,
    ceil_div,
    channel_units,
    channel_vector,
    check_activations,
    check_vectors,
    on_device,
    part_of,
    relu,
)

NO_GRADIENT = tl.constexpr(_NO_GRADIENT)


class Config(NamedTuple):
    """num_stages: steps in flight and in use. programs: to have at least, where the rows suffice for so many.

    rows: of windows that a program takes, at most.
    """

    num_warps: int
    num_stages: int
    programs: int
    rows: int


# With three stages a program has the loads of a whole step, 12 or 14 KiB, in flight while it computes the one before.
# Its first row of windows costs a program half a step more: with 16 rows that is 3 %. Fewer rows for small batches, so
# that as many programs start as an SM's registers let run at once.
CONFIGS = {
    part: {
        "stem_pool": Config(num_warps=4, num_stages=3, programs=4 * multiprocessors, rows=16),
        "stem_pool_bwd": Config(num_warps=4, num_stages=3, programs=4 * multiprocessors, rows=16),
    }
    for part, multiprocessors in MULTIPROCESSORS.items()
}

CHANNEL_BLOCKS = (16, 32, 64)


@triton.jit
def _tile(columns, WO, C, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's tile: image and pooled column `[COLUMNS, 1]` of its columns, channels `[CHANNELS]`, and its mask.

    Column number i of all is column i % WO of image i // WO.
    """
    blocks = tl.cdiv(C, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.cast(tl.program_id(0) // blocks, tl.int64) * COLUMNS
    # Only the tile's first column is divided in 64 bits.
    column = tl.cast(first % WO, tl.int32) + tl.arange(0, COLUMNS)[:, None]
    inside = (tl.arange(0, COLUMNS)[:, None] < columns - first) & (c < C)[None, :]
    return first // WO + column // WO, column % WO, c, inside


@triton.jit
def _first_maximum(z, raw, tap, later_z, later_raw, later_tap):
    """The larger of two candidates, NaN being the largest; the first where they are equal."""
    # Comparing bits takes one instruction for numbers and NaN, which has one pattern after arithmetic. Only zeros of
    # opposite sign look different though they are equal, and a maximum of 0 passes no gradient.
    largest = tl.maximum(z, later_z, propagate_nan=tl.PropagateNan.ALL)
    later = largest.to(tl.int32, bitcast=True) != z.to(tl.int32, bitcast=True)
    return largest, tl.where(later, later_raw, raw), tl.where(later, later_tap, tap)


@triton.jit
def _maximum_of_row(row, left, centre, right, c, inside, scale, shift, left_tap, TAP: tl.constexpr):
    """z, y and tap of the first maximum of a row's three taps, whose numbers are TAP, TAP + 1 and TAP + 2."""
    y_left = tl.load(row + left + c[None, :], mask=inside, other=0.0).to(tl.float32)
    y_centre = tl.load(row + centre + c[None, :], mask=inside, other=0.0).to(tl.float32)
    y_right = tl.load(row + right + c[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.fma(y_left, scale, shift)
    z_centre = tl.fma(y_centre, scale, shift)
    z_right = tl.fma(y_right, scale, shift)
    z, raw, tap = _first_maximum(z, y_left, left_tap + TAP, z_centre, y_centre, TAP + 1)
    return _first_maximum(z, raw, tap, z_right, y_right, TAP + 2)


@triton.jit(do_not_specialize=["columns", "H", "W", "rows", "units"])
def _stem_pool_kernel(
    y,
    bn,
    out,
    y_argmax,
    argmax,
    columns,
    H,
    W,
    rows,
    units,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    HO = (H + 1) // 2
    WO = (W + 1) // 2
    image, wo, c, inside = _tile(columns, WO, C, COLUMNS, CHANNELS)
    scale = channel_vector(bn, 2, c, C)
    shift = channel_vector(bn, 3, c, C)
    # Taps in the padding are replaced by the window's own pixel beside them, which changes no maximum. On the right and
    # below it comes later and is never chosen; on the left and above it stands for itself, under its own number.
    centre = (image * H * W + 2 * wo) * C
    left = tl.where(wo == 0, centre, centre - C)
    right = tl.where(2 * wo + 1 < W, centre + C, centre)
    left_tap = tl.where(wo == 0, 1, 0)
    pooled = (image * HO * WO + wo) * C
    stride = tl.cast(W, tl.int64) * C
    first = tl.program_id(1) * rows
    above = tl.maximum(2 * first - 1, 0)
    z_above, y_above, tap_above = _maximum_of_row(
        y + above * stride, left, centre, right, c, inside, scale, shift, left_tap, 0
    )
    tap_above += tl.where(first == 0, 3, 0)
    for ho in tl.range(first, tl.minimum(first + rows, HO), num_stages=STAGES):
        z, raw, tap = _maximum_of_row(y + 2 * ho * stride, left, centre, right, c, inside, scale, shift, left_tap, 3)
        z, raw, tap = _first_maximum(z_above, y_above, tap_above, z, raw, tap)
        below = tl.minimum(2 * ho + 1, H - 1)
        z_above, y_above, tap_above = _maximum_of_row(
            y + below * stride, left, centre, right, c, inside, scale, shift, left_tap, 0
        )
        z, raw, tap = _first_maximum(z, raw, tap, z_above, y_above, tap_above + 6)
        tap = tl.where(z <= 0, NO_GRADIENT, tap)
        offsets = pooled + c[None, :] + ho * (tl.cast(WO, tl.int64) * C)
        tl.store(out + offsets, relu(z).to(out.dtype.element_ty), mask=inside)
        tl.store(y_argmax + offsets, raw.to(y_argmax.dtype.element_ty), mask=inside)
        tl.store(argmax + offsets, tap.to(tl.uint8), mask=inside)


@triton.jit
def _windows(g, argmax, row, columns, c, inside):
    """Gradients and codes of a row's windows; without gradient outside."""
    offsets = row + columns + c[None, :]
    gradient = tl.load(g + offsets, mask=inside, other=0.0).to(tl.float32)
    return gradient, tl.load(argmax + offsets, mask=inside, other=0)


@triton.jit
def _add(routed, gradient, chosen):
    return tl.where(chosen, routed + gradient, routed)


@triton.jit
def _store_dy(dy, y, routed, offsets, inside, scale, slope, offset):
    if y is not None:
        routed += tl.fma(tl.load(y + offsets, mask=inside, other=0.0).to(tl.float32), slope, offset)
    tl.store(dy + offsets, (routed * scale).to(dy.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["columns", "H", "W", "rows", "units"])
def _stem_pool_bwd_kernel(
    g,
    argmax,
    y,
    bn,
    grad,
    dy,
    columns,
    H,
    W,
    rows,
    units,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    HO = (H + 1) // 2
    WO = (W + 1) // 2
    image, wo, c, inside = _tile(columns, WO, C, COLUMNS, CHANNELS)
    scale = channel_vector(bn, 2, c, C)
    slope, offset = scale, scale
    if y is not None:
        slope = channel_vector(grad, 2, c, C)
        offset = channel_vector(grad, 3, c, C)
    # Pixels 2i and 2i + 1 of a column or row belong to window i; the odd one to window i + 1 too.
    window = (image * HO * WO + wo) * C
    next_inside = inside & (wo + 1 < WO)
    window_stride = tl.cast(WO, tl.int64) * C
    even = (image * H * W + 2 * wo) * C + c[None, :]
    odd = even + C
    odd_inside = inside & (2 * wo + 1 < W)
    stride = tl.cast(W, tl.int64) * C
    first = tl.program_id(1) * rows
    g_here, at_here = _windows(g, argmax, first * window_stride, window, c, inside)
    g_next, at_next = _windows(g, argmax, first * window_stride, window + C, c, next_inside)
    for ho in tl.range(first, tl.minimum(first + rows, HO), num_stages=STAGES):
        below = (ho + 1) * window_stride
        more = ho + 1 < HO
        g_below, at_below = _windows(g, argmax, below, window, c, inside & more)
        g_diagonal, at_diagonal = _windows(g, argmax, below, window + C, c, next_inside & more)
        row = 2 * ho * stride
        routed = tl.where(at_here == 4, g_here, 0.0)
        _store_dy(dy, y, routed, row + even, inside, scale, slope, offset)
        routed = _add(tl.where(at_next == 3, g_next, 0.0), g_here, at_here == 5)
        _store_dy(dy, y, routed, row + odd, odd_inside, scale, slope, offset)
        row += stride
        exists = 2 * ho + 1 < H
        routed = _add(tl.where(at_below == 1, g_below, 0.0), g_here, at_here == 7)
        _store_dy(dy, y, routed, row + even, inside & exists, scale, slope, offset)
        routed = _add(tl.where(at_diagonal == 0, g_diagonal, 0.0), g_below, at_below == 2)
        routed = _add(_add(routed, g_next, at_next == 6), g_here, at_here == 8)
        _store_dy(dy, y, routed, row + odd, odd_inside & exists, scale, slope, offset)
        g_here, at_here, g_next, at_next = g_below, at_below, g_diagonal, at_diagonal


class Tiling(NamedTuple):
    """How a launch divides its work. rows: of windows per program. columns, channels: of a tile."""

    grid: tuple[int, int]
    rows: int
    columns: int
    channels: int


def tiling(windows: torch.Size, itemsize: int, config: Config) -> Tiling:
    """For windows `[N, Ho, Wo, C]`: the narrowest block that holds all channels, else the widest, and of each tap 16
    bytes a thread; 4 values where the channels do not fill 16 bytes, as each may then need an address of its own."""
    n, ho, wo, c = windows
    vector = 16 // itemsize
    values = 32 * config.num_warps * (vector if c % vector == 0 else 4)
    block = next((block for block in CHANNEL_BLOCKS if block >= c), CHANNEL_BLOCKS[-1])
    tiles = ceil_div(n * wo, values // block) * ceil_div(c, block)
    parts = min(ho, max(ceil_div(ho, config.rows), ceil_div(config.programs, tiles)))
    rows = ceil_div(ho, parts)
    return Tiling((tiles, ceil_div(ho, rows)), rows, values // block, block)


def stem_pool(y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, y_argmax and argmax of y `[N, H, W, C]`, pooled; reads y, writes them. See the reference.

    Raises TypeError for a dtype that Triton kernels do not take, ValueError for memory that is not dense, for shapes
    and devices that do not fit.
    """
    check_activations("stem_pool", y=y)
    check_vectors("stem_pool", y, bn=bn)
    n, h, w, c = y.shape
    ho, wo = (h + 1) // 2, (w + 1) // 2
    out = torch.empty(n, ho, wo, c, dtype=y.dtype, device=y.device)
    y_argmax = torch.empty_like(out)
    argmax = torch.empty(out.shape, dtype=torch.uint8, device=y.device)
    if y.numel() == 0:
        return out, y_argmax, argmax
    config = CONFIGS[part_of(y.device)]["stem_pool"]
    grid, rows, *tile = tiling(out.shape, y.element_size(), config)
    with on_device(y.device):
        _stem_pool_kernel[grid](
            y,
            bn,
            out,
            y_argmax,
            argmax,
            n * wo,
            h,
            w,
            rows,
            *channel_units(c),
            *tile,
            config.num_stages,
            num_warps=config.num_warps,
        )
    return out, y_argmax, argmax


def stem_pool_bwd(
    g: Tensor, argmax: Tensor, input_hw: Pair, bn: Tensor, grad: Tensor | None, *, y: Tensor | None = None
) -> Tensor:
    """dy `[N, H, W, C]`; reads g and argmax (and y, unless the statistics are constant), writes dy. See the reference.

    Raises as `stem_pool` does, and ValueError where argmax or input_hw is not that of g's forward pass.
    """
    check_activations("stem_pool_bwd", g=g)
    check_vectors("stem_pool_bwd", g, bn=bn, grad=grad)
    if (argmax.dtype, argmax.shape, argmax.device) != (torch.uint8, g.shape, g.device) or not argmax.is_contiguous():
        raise ValueError(
            f"stem_pool_bwd: argmax must be dense uint8 {tuple(g.shape)} on {g.device}, as stem_pool gave it; it is "
            f"{argmax.dtype} {tuple(argmax.shape)} on {argmax.device} with strides {argmax.stride()}"
        )
    (n, ho, wo, c), (h, w) = g.shape, input_hw
    if (ho, wo) != ((h + 1) // 2, (w + 1) // 2):
        raise ValueError(
            f"stem_pool_bwd: input_hw is {(h, w)}, which has {((h + 1) // 2, (w + 1) // 2)} windows, argmax has "
            f"{(ho, wo)}: pass the height and width of stem_pool's y"
        )
    dy = torch.empty(n, h, w, c, dtype=g.dtype, device=g.device)
    check_activations("stem_pool_bwd", dy=dy, y=y)
    if dy.numel() == 0:
        return dy
    config = CONFIGS[part_of(g.device)]["stem_pool_bwd"]
    grid, rows, *tile = tiling(g.shape, g.element_size(), config)
    with on_device(g.device):
        _stem_pool_bwd_kernel[grid](
            g,
            argmax,
            None if grad is None else y,
            bn,
            grad,
            dy,
            n * wo,
            h,
            w,
            rows,
            *channel_units(c),
            *tile,
            config.num_stages,
            num_warps=config.num_warps,
        )
    return dy
