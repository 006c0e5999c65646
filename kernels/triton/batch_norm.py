"""Batch norm: statistics in one read, application with residual add and ReLU, and both passes of its backward.

    channel_stats    Welford partials of y: per program and channel the rows, the mean, the squared deviations from it
    bn_finalize      mean, rstd, scale and shift from the partials, and the running statistics moved, in one launch
    bn_constants     mean, rstd, scale and shift from running statistics
    bn_act           out = relu(scale*y + shift + shortcut)
    bn_bwd_reduce    partial sums of g' and g'*(y - mean), g' being g behind the ReLU's mask; for one BN or for two
    bn_bwd_mask      the same for one BN, and g' itself, in g's memory
    bn_bwd_finalize  dgamma, dbeta, b and c from the partial sums
    bn_bwd_apply     dy = scale*(g' + b*y + c), and the shortcut's gradient
    add_masked       (g + residual) behind a ReLU's mask: the gradient of a block's input

`fastres.kernels.reference.batch_norm` defines every form. Layout: dense `[N, H, W, C]` seen as `[M, C]`, any M and C;
float32, float16 or bfloat16 in memory, float32 in registers, per-channel vectors `[4, C]` in float32.

Bytes moved: every activation once, and a few vectors of 64 floats per program, which are what bn_finalize and
bn_bwd_finalize read. All of it is bound by memory: accesses are 16 bytes wide (where C is a multiple of 8 in 16-bit
dtypes, of 4 in float32; other C fall to one value at a time) and are issued tiles ahead of their use. A tile is 64
channels wide, a whole 128-byte line in 16-bit dtypes; programs with neighbouring numbers read neighbouring memory. Row
offsets are 64-bit.

Two passes read the same tensors soon after one another: channel_stats and then bn_act the y, bn_bwd_reduce and then
bn_bwd_apply the g, y and out. The first of the two walks from the last row to the first, the second from the first to
the last. So the second begins with the rows that the first has read last, which are still in L2 as far as they fit,
and the first begins with the rows that the convolution before it has written last. Were both to walk one way, a tensor
somewhat larger than L2 would have left it whenever its beginning is needed again. Loops count upwards all the same,
from the last block: a compiled loop with a negative step never runs.

Not used for float64 (the reference serves it), on CPUs, and below compute capability 8.0.

Sizes are not specialised on: UNIT says what alignment needs, and the smaller last batch of an epoch compiles nothing.

Deterministic: sums are split over a number of programs that depends on shape, dtype and part only, every program adds
its rows in order, and nothing is atomic. No value is read by the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.batch_norm import ChannelStats
from ._common import (
    DTYPES,
    MULTIPROCESSORS,
    ceil_div,
    channel_units,
    channel_vector,
    check_activations,
    check_dense,
    check_device,
    check_vectors,
    empty_stats,
    on_device,
    part_of,
    relu,
)


class Config(NamedTuple):
    """tile_bytes: of one operand in one tile. num_stages: tiles in flight and in use. programs: the grid's, at most."""

    tile_bytes: int
    num_warps: int
    num_stages: int
    programs: int


# A loop over tiles whose loads go through cp.async, because plain loads of a larger tile are not in flight together:
# the compiler moves most of them behind the first use, in whatever order they are written. 4 KiB and 4 warps are two
# 16-byte accesses per thread and operand. The programs per SM are what its registers and shared memory let run at once;
# with the stages they keep 64 KiB of loads or more in flight on each, of channel_stats' one operand too.
CONFIGS = {
    part: {
        "channel_stats": Config(tile_bytes=4096, num_warps=4, num_stages=5, programs=4 * multiprocessors),
        "bn_act": Config(tile_bytes=4096, num_warps=4, num_stages=4, programs=6 * multiprocessors),
        "bn_bwd_reduce": Config(tile_bytes=4096, num_warps=4, num_stages=3, programs=4 * multiprocessors),
        "bn_bwd_apply": Config(tile_bytes=4096, num_warps=4, num_stages=3, programs=4 * multiprocessors),
    }
    for part, multiprocessors in MULTIPROCESSORS.items()
}

CHANNEL_BLOCKS = (16, 32, 64)


class FinalizeConfig(NamedTuple):
    """groups, channels: of partials in one tile. num_stages: tiles in flight and in use."""

    groups: int
    channels: int
    num_warps: int
    num_stages: int


# A few hundred KiB that lie in L2: what counts is that few loads wait for one another. A block of channels as narrow as
# a 32-byte sector spreads 64 channels over 8 programs, and 128 groups at a time see a whole grid's partials in 5 tiles.
FINALIZE = FinalizeConfig(groups=128, channels=8, num_warps=4, num_stages=3)


def tile_shape(channels: int, itemsize: int, config: Config) -> tuple[int, int]:
    """Rows and channels of a tile: the narrowest block that holds all channels, else the widest."""
    block = next((block for block in CHANNEL_BLOCKS if block >= channels), CHANNEL_BLOCKS[-1])
    return config.tile_bytes // (itemsize * block), block


def splits(rows: int, channels: int, tile_rows: int, tile_channels: int, config: Config) -> int:
    """Programs that share the rows of one channel block; at least one, so that the sums of no rows are written as 0."""
    return max(1, min(config.programs // ceil_div(channels, tile_channels), ceil_div(rows, tile_rows)))


@triton.jit
def _tile(row, M, C, c, ROWS: tl.constexpr):
    """Of the tile at rows row.. and channels c: the 64-bit offset of its first row, offsets within it, and its mask."""
    r = tl.arange(0, ROWS)[:, None]
    return tl.cast(row, tl.int64) * C, r * C + c[None, :], (r < M - row) & (c < C)[None, :]


@triton.jit
def _load(pointer, base, offsets, inside):
    return tl.load(pointer + base + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _blocks(M, ROWS: tl.constexpr):
    """Blocks of rows; `tl.cdiv` adds to M before it divides, and overflows for M just below 2**31."""
    return (M - 1) // ROWS + 1


@triton.jit(do_not_specialize=["M", "units"])
def _channel_stats_kernel(
    y,
    count,
    mean,
    m2,
    M,
    units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    last = _blocks(M, ROWS) - 1
    # Deviations from a pivot need neither Welford's divisions nor the digits of a large mean (Chan, Golub & LeVeque,
    # 1983, on shifted data). With one of the program's own rows as the pivot, cancellation is bounded: that row alone
    # makes m2 at least (pivot - mean)**2, and the sum of squares is m2 + rows*(pivot - mean)**2.
    first_row = tl.cast(last - tl.program_id(1), tl.int64) * ROWS
    pivot = tl.load(y + first_row * C + c, mask=(c < C) & (M > 0), other=0.0).to(tl.float32)
    n = tl.zeros((ROWS, 1), tl.float32)
    deviations = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    # Neighbouring programs read neighbouring blocks of rows, so that the device walks through memory in order.
    for index in tl.range(tl.program_id(1), last + 1, tl.num_programs(1), num_stages=STAGES):
        row = (last - index) * ROWS  # Compiled loops count upwards only.
        base, offsets, inside = _tile(row, M, C, c, ROWS)
        present = (tl.arange(0, ROWS)[:, None] < M - row).to(tl.float32)
        deviation = tl.fma(-present, pivot[None, :], _load(y, base, offsets, inside))
        n += present
        deviations += deviation
        squares = tl.fma(deviation, deviation, squares)
    rows = tl.sum(n)
    total = tl.sum(deviations, 0)
    offset = tl.div_rn(total, tl.maximum(rows, 1.0))
    if tl.program_id(0) == 0:
        tl.store(count + tl.program_id(1), rows)
    group = tl.program_id(1) * C + c
    tl.store(mean + group, pivot + offset, mask=c < C)
    tl.store(m2 + group, tl.fma(-total, offset, tl.sum(squares, 0)), mask=c < C)


@triton.jit
def _vector(pointer, c, C):
    return tl.load(pointer + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def store_bn(bn, mean, var, weight, bias, eps, c, C):
    """Write mean, rstd, scale and shift."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = rstd
    if weight is not None:
        scale *= _vector(weight, c, C)
    shift = -mean * scale
    if bias is not None:
        shift += _vector(bias, c, C)
    tl.store(bn + c, mean, mask=c < C)
    tl.store(bn + C + c, rstd, mask=c < C)
    tl.store(bn + 2 * C + c, scale, mask=c < C)
    tl.store(bn + 3 * C + c, shift, mask=c < C)


@triton.jit
def _move(running, batch, num_batches_tracked, momentum, c, C):
    old = _vector(running, c, C)
    # A sum of shares: a step added to the old value would lose the digits of a batch far smaller than that.
    if momentum is None:
        batches = tl.load(num_batches_tracked).to(tl.float32)
        new = tl.div_rn(tl.fma(old, batches - 1, batch), batches)
    else:
        new = tl.fma(old, 1 - momentum, momentum * batch)
    tl.store(running + c, new.to(running.dtype.element_ty), mask=c < C)


@triton.jit
def move_running(running_mean, running_var, num_batches_tracked, mean, m2, rows, momentum, c, C):
    """Move the running statistics, where there are some, towards a batch's by `momentum` or, where that is None, by
    1/num_batches_tracked; and count the batch. m2: the sum of squared deviations of its rows.
    """
    if running_mean is not None:
        _move(running_mean, mean, num_batches_tracked, momentum, c, C)
        _move(running_var, tl.div_rn(m2, rows - 1), num_batches_tracked, momentum, c, C)
        # Without momentum every program reads the counter: then the launcher has counted already.
        if num_batches_tracked is not None and momentum is not None:
            if tl.program_id(0) == 0:
                tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)


@triton.jit(do_not_specialize=["P", "units"])
def _bn_finalize_kernel(
    count,
    mean,
    m2,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches_tracked,
    bn,
    P,
    momentum,
    eps,
    units,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    pivot = _vector(mean, c, C)
    # Each lane merges every GROUPS-th group into its own (Chan, Golub & LeVeque, 1979). Means are differences from the
    # pivot there, which keep the digits that a large mean would take.
    n = tl.zeros((GROUPS, 1), tl.float32)
    lane_mean = tl.zeros((GROUPS, CHANNELS), tl.float32)
    lane_m2 = tl.zeros((GROUPS, CHANNELS), tl.float32)
    for block in tl.range(0, tl.cdiv(P, GROUPS), num_stages=STAGES):
        base, offsets, inside = _tile(block * GROUPS, P, C, c, GROUPS)
        group = block * GROUPS + tl.arange(0, GROUPS)
        rows = tl.load(count + group, mask=group < P, other=0.0)[:, None]
        share = tl.where(rows > 0, tl.div_rn(rows, n + rows), 0.0)
        delta = _load(mean, base, offsets, inside) - pivot[None, :] - lane_mean
        lane_mean = tl.fma(delta, share, lane_mean)
        lane_m2 += tl.fma(delta * (n * share), delta, _load(m2, base, offsets, inside))
        n += rows
    total = tl.sum(n)
    offset = tl.div_rn(tl.sum(n * lane_mean, 0), total)
    batch_mean = pivot + offset
    lane_mean -= offset[None, :]
    batch_m2 = tl.sum(tl.fma(n * lane_mean, lane_mean, lane_m2), 0)
    store_bn(bn, batch_mean, tl.div_rn(batch_m2, total), weight, bias, eps, c, C)
    move_running(running_mean, running_var, num_batches_tracked, batch_mean, batch_m2, total, momentum, c, C)


@triton.jit(do_not_specialize=["units"])
def _bn_constants_kernel(
    running_mean, running_var, weight, bias, bn, eps, units, UNIT: tl.constexpr, CHANNELS: tl.constexpr
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    store_bn(bn, _vector(running_mean, c, C), _vector(running_var, c, C), weight, bias, eps, c, C)


@triton.jit(do_not_specialize=["M", "units"])
def _bn_act_kernel(
    y,
    bn,
    residual,
    residual_bn,
    out,
    M,
    units,
    UNIT: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    scale = channel_vector(bn, 2, c, C)
    shift = channel_vector(bn, 3, c, C)
    if residual_bn is not None:
        residual_scale = channel_vector(residual_bn, 2, c, C)
        residual_shift = channel_vector(residual_bn, 3, c, C)
    for block in tl.range(tl.program_id(1), _blocks(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        base, offsets, inside = _tile(block * ROWS, M, C, c, ROWS)
        z = tl.fma(_load(y, base, offsets, inside), scale, shift)
        if residual is not None:
            shortcut = _load(residual, base, offsets, inside)
            if residual_bn is not None:
                shortcut = tl.fma(shortcut, residual_scale, residual_shift)
            z += shortcut
        if RELU:
            z = relu(z)
        tl.store(out + base + offsets, z.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "units"])
def _bn_bwd_reduce_kernel(
    g,
    y,
    bn,
    out,
    residual,
    residual_bn,
    masked,
    sums,
    residual_sums,
    M,
    units,
    UNIT: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mean = channel_vector(bn, 0, c, C)
    scale = channel_vector(bn, 2, c, C)
    shift = channel_vector(bn, 3, c, C)
    sum_g = tl.zeros((ROWS, CHANNELS), tl.float32)
    centred = tl.zeros((ROWS, CHANNELS), tl.float32)
    if residual is not None:
        residual_mean = channel_vector(residual_bn, 0, c, C)
        residual_centred = tl.zeros((ROWS, CHANNELS), tl.float32)
    last = _blocks(M, ROWS) - 1
    for index in tl.range(tl.program_id(1), last + 1, tl.num_programs(1), num_stages=STAGES):
        base, offsets, inside = _tile((last - index) * ROWS, M, C, c, ROWS)
        grad = _load(g, base, offsets, inside)
        raw = _load(y, base, offsets, inside)
        if out is not None:
            grad = tl.where(_load(out, base, offsets, inside) <= 0, 0.0, grad)
        elif RELU:
            grad = tl.where(tl.fma(raw, scale, shift) <= 0, 0.0, grad)
        if masked is not None:
            tl.store(masked + base + offsets, grad.to(masked.dtype.element_ty), mask=inside)
        sum_g += grad
        centred += grad * (raw - mean)
        if residual is not None:
            residual_centred += grad * (_load(residual, base, offsets, inside) - residual_mean)
    row = tl.program_id(1) * 2 * C + c
    total = tl.sum(sum_g, 0)
    tl.store(sums + row, total, mask=c < C)
    tl.store(sums + row + C, tl.sum(centred, 0), mask=c < C)
    if residual is not None:
        tl.store(residual_sums + row, total, mask=c < C)
        tl.store(residual_sums + row + C, tl.sum(residual_centred, 0), mask=c < C)


@triton.jit(do_not_specialize=["P", "units"])
def _bn_bwd_finalize_kernel(
    sums,
    bn,
    grad,
    P,
    rows,
    units,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sum_g = tl.zeros((GROUPS, CHANNELS), tl.float32)
    centred = tl.zeros((GROUPS, CHANNELS), tl.float32)
    for block in tl.range(0, tl.cdiv(P, GROUPS), num_stages=STAGES):
        base, offsets, inside = _tile(block * GROUPS, P, 2 * C, c, GROUPS)
        inside &= (c < C)[None, :]
        sum_g += _load(sums, base, offsets, inside)
        centred += _load(sums + C, base, offsets, inside)
    rstd = _vector(bn + C, c, C)
    dbeta = tl.sum(sum_g, 0)
    dgamma = rstd * tl.sum(centred, 0)
    slope = tl.zeros_like(dbeta)
    offset = tl.zeros_like(dbeta)
    if rows is not None:
        slope = tl.div_rn(-rstd * dgamma, rows)
        # From b as it is stored: at a large mean its rounding would show in b*y + c.
        offset = -tl.fma(_vector(bn, c, C), slope, tl.div_rn(dbeta, rows))
    tl.store(grad + c, dgamma, mask=c < C)
    tl.store(grad + C + c, dbeta, mask=c < C)
    tl.store(grad + 2 * C + c, slope, mask=c < C)
    tl.store(grad + 3 * C + c, offset, mask=c < C)


@triton.jit(do_not_specialize=["M", "units"])
def _bn_bwd_apply_kernel(
    g,
    y,
    bn,
    grad,
    out,
    residual,
    residual_bn,
    residual_grad,
    dy,
    dresidual,
    M,
    units,
    UNIT: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    scale = channel_vector(bn, 2, c, C)
    if RELU:
        shift = channel_vector(bn, 3, c, C)
    if grad is not None:
        slope = channel_vector(grad, 2, c, C)
        offset = channel_vector(grad, 3, c, C)
    if residual_bn is not None:
        residual_scale = channel_vector(residual_bn, 2, c, C)
    if residual_grad is not None:
        residual_slope = channel_vector(residual_grad, 2, c, C)
        residual_offset = channel_vector(residual_grad, 3, c, C)
    for block in tl.range(tl.program_id(1), _blocks(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        base, offsets, inside = _tile(block * ROWS, M, C, c, ROWS)
        through = _load(g, base, offsets, inside)
        if y is not None:
            raw = _load(y, base, offsets, inside)
        if out is not None:
            through = tl.where(_load(out, base, offsets, inside) <= 0, 0.0, through)
        elif RELU:
            through = tl.where(tl.fma(raw, scale, shift) <= 0, 0.0, through)
        result = through
        if grad is not None:
            result += tl.fma(raw, slope, offset)
        tl.store(dy + base + offsets, (result * scale).to(dy.dtype.element_ty), mask=inside)
        if dresidual is not None:
            result = through
            if residual_grad is not None:
                result += tl.fma(_load(residual, base, offsets, inside), residual_slope, residual_offset)
            if residual_bn is not None:
                result *= residual_scale
            tl.store(dresidual + base + offsets, result.to(dresidual.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "units"])
def _add_masked_kernel(
    g,
    residual,
    out,
    M,
    units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    for block in tl.range(tl.program_id(1), _blocks(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        base, offsets, inside = _tile(block * ROWS, M, C, c, ROWS)
        total = _load(g, base, offsets, inside) + _load(residual, base, offsets, inside)
        total = tl.where(_load(out, base, offsets, inside) <= 0, 0.0, total)
        tl.store(g + base + offsets, total.to(g.dtype.element_ty), mask=inside)


class _Walk(NamedTuple):
    """How programs share the tiles of a tensor `[rows, channels]`. programs: for each block of channels."""

    device: torch.device
    rows: int
    channels: int
    tile: tuple[int, int]
    programs: int
    config: Config

    @classmethod
    def over(cls, t: Tensor, configured: str) -> _Walk:
        """The walk over t `[N, H, W, C]` by `CONFIGS[part][configured]`."""
        rows, channels = t.shape[:-1].numel(), t.shape[-1]
        config = CONFIGS[part_of(t.device)][configured]
        tile = tile_shape(channels, t.element_size(), config)
        return cls(t.device, rows, channels, tile, splits(rows, channels, *tile, config), config)

    def launch(self, kernel: triton.JITFunction, *operands: Tensor | None, flags: tuple[bool, ...] = ()) -> None:
        """Start a kernel that takes operands, sizes, its own flags, tile and stages, in this order."""
        grid = (ceil_div(self.channels, self.tile[1]), self.programs)
        sizes = self.rows, *channel_units(self.channels)
        with on_device(self.device):
            kernel[grid](*operands, *sizes, *flags, *self.tile, self.config.num_stages, num_warps=self.config.num_warps)


def channel_stats(y: Tensor) -> ChannelStats:
    """Welford partials, a group per program; reads y, writes little. See the reference.

    Raises TypeError for a dtype that Triton kernels do not take, ValueError for memory that is not dense.
    """
    check_activations("channel_stats", y=y)
    walk = _Walk.over(y, "channel_stats")
    stats = empty_stats(walk.programs, walk.channels, y.device)
    walk.launch(_channel_stats_kernel, y, *stats)
    return stats


def check_running(
    kernel: str,
    device: torch.device,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Raise unless a batch norm's parameters and state fit; with momentum None, count the batch."""
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_dense(kernel, (channels,), DTYPES, device, **vectors)
    check_dense(kernel, (), (torch.int64,), device, num_batches_tracked=num_batches_tracked)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{kernel}: running_mean and running_var belong together: pass both, or neither")
    if running_mean is not None and momentum is None:
        if num_batches_tracked is None:
            raise ValueError(f"{kernel}: momentum=None needs num_batches_tracked: pass it, or a momentum")
        num_batches_tracked.add_(1)


def bn_finalize(
    stats: ChannelStats,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """`bn` `[4, C]` from partials in float32, and running statistics moved in place, in one launch. See the reference.

    Parameters and running statistics may be float32, float16 or bfloat16. With momentum None a second launch counts
    the batch before.

    Raises ValueError where an argument is not dense or does not fit the others' shapes and device, for one running
    statistic without the other, and for a cumulative average (momentum None) without num_batches_tracked.
    """
    kernel = "bn_finalize"
    count, mean, m2 = stats
    groups, channels = mean.shape
    check_device(kernel, "stats.mean", mean)
    check_dense(kernel, (groups,), (torch.float32,), mean.device, **{"stats.count": count})
    check_dense(kernel, (groups, channels), (torch.float32,), mean.device, **{"stats.mean": mean, "stats.m2": m2})
    check_running(kernel, mean.device, channels, weight, bias, running_mean, running_var, num_batches_tracked, momentum)
    bn = torch.empty(4, channels, dtype=torch.float32, device=mean.device)
    with on_device(mean.device):
        _bn_finalize_kernel[(ceil_div(channels, FINALIZE.channels),)](
            count,
            mean,
            m2,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            bn,
            groups,
            momentum,
            eps,
            *channel_units(channels),
            FINALIZE.groups,
            FINALIZE.channels,
            FINALIZE.num_stages,
            num_warps=FINALIZE.num_warps,
        )
    return bn


def bn_constants(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """`bn` `[4, C]` from constant statistics in float32, float16 or bfloat16, in one launch. See the reference.

    Raises TypeError for activations (`dtype`) that Triton kernels do not take, ValueError where a vector is not dense
    `[C]` or on another device.
    """
    if dtype not in DTYPES:
        raise TypeError(
            f"bn_constants: dtype is {dtype}, the Triton kernels take float32, float16 and bfloat16: "
            "use backend='reference'"
        )
    channels, device = running_mean.numel(), running_mean.device
    check_device("bn_constants", "running_mean", running_mean)
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    check_dense("bn_constants", (channels,), DTYPES, device, **vectors)
    bn = torch.empty(4, channels, dtype=torch.float32, device=device)
    block = 128  # a value per thread
    with on_device(device):
        _bn_constants_kernel[(ceil_div(channels, block),)](
            *vectors.values(), bn, eps, *channel_units(channels), block, num_warps=4
        )
    return bn


def bn_act(
    y: Tensor, bn: Tensor, residual: Tensor | None = None, residual_bn: Tensor | None = None, relu: bool = True
) -> Tensor:
    """out = relu(scale*y + shift + shortcut); reads y (and residual), writes out. See the reference.

    Raises TypeError for a dtype that Triton kernels do not take, ValueError for memory that is not dense, for shapes
    and devices that do not fit, and for a residual_bn without its residual.
    """
    check_activations("bn_act", y=y, residual=residual)
    check_vectors("bn_act", y, bn=bn, residual_bn=residual_bn)
    if residual is None and residual_bn is not None:
        raise ValueError("bn_act: residual_bn was given without residual: pass both, or neither")
    out = torch.empty_like(y)
    if y.numel() == 0:
        return out
    _Walk.over(y, "bn_act").launch(_bn_act_kernel, y, bn, residual, residual_bn, out, flags=(relu,))
    return out


def bn_bwd_reduce(
    g: Tensor,
    y: Tensor,
    bn: Tensor,
    *,
    out: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    residual_bn: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Partial sums `[P, 2, C]` for one BN or two; reads g, y (out, residual), writes little. See the reference.

    Raises as `bn_act` does.
    """
    if (residual is None) != (residual_bn is None):
        raise ValueError("bn_bwd_reduce: residual and residual_bn describe one branch: pass both, or neither")
    return _reduce("bn_bwd_reduce", g, y, bn, out, relu, residual, residual_bn, None)


def bn_bwd_mask(g: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """g' in g's memory and partial sums `[P, 2, C]`; reads g and y, writes g'. See the reference.

    Raises as `bn_act` does.
    """
    sums, _ = _reduce("bn_bwd_mask", g, y, bn, None, True, None, None, g)
    return g, sums


def _reduce(
    kernel: str,
    g: Tensor,
    y: Tensor,
    bn: Tensor,
    out: Tensor | None,
    relu: bool,
    residual: Tensor | None,
    residual_bn: Tensor | None,
    masked: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    check_activations(kernel, g=g, y=y, out=out, residual=residual)
    check_vectors(kernel, y, bn=bn, residual_bn=residual_bn)
    walk = _Walk.over(y, "bn_bwd_reduce")
    sums = torch.empty(walk.programs, 2, walk.channels, dtype=torch.float32, device=y.device)
    residual_sums = None if residual is None else torch.empty_like(sums)
    operands = g, y, bn, out, residual, residual_bn, masked, sums, residual_sums
    walk.launch(_bn_bwd_reduce_kernel, *operands, flags=(relu,))
    return sums, residual_sums


def bn_bwd_finalize(sums: Tensor, bn: Tensor, count: int | None) -> Tensor:
    """`grad` `[4, C]` from the partial sums `[P, 2, C]` in float32, in one launch. See the reference.

    Raises ValueError where sums or bn are not dense float32, or do not fit one another.
    """
    groups, _, channels = sums.shape
    check_device("bn_bwd_finalize", "sums", sums)
    check_dense("bn_bwd_finalize", (groups, 2, channels), (torch.float32,), sums.device, sums=sums)
    check_vectors("bn_bwd_finalize", sums, bn=bn)
    grad = torch.empty_like(bn)
    with on_device(sums.device):
        _bn_bwd_finalize_kernel[(ceil_div(channels, FINALIZE.channels),)](
            sums,
            bn,
            grad,
            groups,
            # As a float, of which Triton compiles no variants by value.
            None if count is None else float(count),
            *channel_units(channels),
            FINALIZE.groups,
            FINALIZE.channels,
            FINALIZE.num_stages,
            num_warps=FINALIZE.num_warps,
        )
    return grad


def bn_bwd_apply(
    g: Tensor,
    y: Tensor | None,
    bn: Tensor,
    grad: Tensor | None,
    *,
    out: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    residual_bn: Tensor | None = None,
    residual_grad: Tensor | None = None,
    need_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dy and the shortcut's gradient; reads g (y, out, residual), writes dy (dresidual). See the reference.

    With constant statistics, which a None for y, grad, residual or residual_grad says, y is read for the mask only and
    residual not at all. Where no ReLU masks g, the gradient of an identity shortcut is g itself and nothing is written
    for it.

    Raises as `bn_act` does, and ValueError where the mask or a branch lacks a tensor that it is formed from.
    """
    check_activations("bn_bwd_apply", g=g, y=y, out=out, residual=residual)
    check_vectors("bn_bwd_apply", g, bn=bn, grad=grad, residual_bn=residual_bn, residual_grad=residual_grad)
    if relu and out is None and y is None:
        raise ValueError("bn_bwd_apply: the ReLU's mask needs its output or its input: pass out or y")
    if residual is not None and residual_bn is None:
        raise ValueError("bn_bwd_apply: residual needs residual_bn: pass both, or neither")
    dy = torch.empty_like(g)
    identity_unmasked = residual_bn is None and out is None and not relu
    dresidual = torch.empty_like(g) if need_residual and not identity_unmasked else None
    by_input = relu and out is None
    if y is None or grad is None:
        y, grad = (y if by_input else None), None
    if residual is None or residual_grad is None or dresidual is None:
        residual = residual_grad = None
    if g.numel():
        operands = g, y, bn, grad, out, residual, residual_bn, residual_grad, dy, dresidual
        _Walk.over(g, "bn_bwd_apply").launch(_bn_bwd_apply_kernel, *operands, flags=(by_input,))
    return dy, g if need_residual and identity_unmasked else dresidual


def add_masked(g: Tensor, residual: Tensor, out: Tensor) -> Tensor:
    """(g + residual)*(out > 0) in g's memory; reads g, residual and out, writes g. See the reference.

    Raises as `bn_act` does.
    """
    check_activations("add_masked", g=g, residual=residual, out=out)
    if g.numel():
        _Walk.over(g, "bn_bwd_apply").launch(_add_masked_kernel, g, residual, out)
    return g
