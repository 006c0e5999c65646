"""Batch norm applied with residual add and ReLU, and both passes of its backward, each in one read of its operands.

    bn_act         out = relu(scale*y + shift + shortcut)
    bn_bwd_reduce  partial sums of g' and g'*(y - mean), g' being g behind the ReLU's mask; for one BN or for two
    bn_bwd_apply   dy = scale*(g' + b*y + c), and the shortcut's gradient

`fastres.kernels.reference.batch_norm` defines every form. Layout: dense `[N, H, W, C]` seen as `[M, C]`, any M and C;
float32, float16 or bfloat16 in memory, float32 in registers, per-channel vectors `[4, C]` in float32.

Bytes moved: every operand once, and a few vectors of 64 floats per program. All of it is bound by memory: accesses are
16 bytes wide (where C is a multiple of 16) and are issued tiles ahead of their use. A tile is 64 channels wide, a whole
128-byte line in 16-bit dtypes; programs with neighbouring numbers read neighbouring memory. Row offsets are 64-bit.

Not used for float64 (the reference serves it), on CPUs, and below compute capability 8.0.

Deterministic: sums are split over a number of programs that depends on shape, dtype and part only, every program adds
its rows in order, and nothing is atomic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MULTIPROCESSORS,
    channel_vector,
    check_activations,
    check_vectors,
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
# 16-byte accesses per thread and operand. The programs per SM are what its registers and shared memory let run at once.
CONFIGS = {
    part: {
        "bn_act": Config(tile_bytes=4096, num_warps=4, num_stages=4, programs=6 * multiprocessors),
        "bn_bwd_reduce": Config(tile_bytes=4096, num_warps=4, num_stages=3, programs=4 * multiprocessors),
        "bn_bwd_apply": Config(tile_bytes=4096, num_warps=4, num_stages=3, programs=4 * multiprocessors),
    }
    for part, multiprocessors in MULTIPROCESSORS.items()
}

CHANNEL_BLOCKS = (16, 32, 64)


def tile_shape(channels: int, itemsize: int, config: Config) -> tuple[int, int]:
    """Rows and channels of a tile: the narrowest block that holds all channels, else the widest."""
    block = next((block for block in CHANNEL_BLOCKS if block >= channels), CHANNEL_BLOCKS[-1])
    return config.tile_bytes // (itemsize * block), block


def splits(rows: int, channels: int, tile_rows: int, tile_channels: int, config: Config) -> int:
    """Programs that share the rows of one channel block; at least one, so that the sums of no rows are written as 0."""
    return max(1, min(config.programs // triton.cdiv(channels, tile_channels), triton.cdiv(rows, tile_rows)))


@triton.jit
def _tile(row, M, C, c, ROWS: tl.constexpr):
    """Of the tile at rows row.. and channels c: the 64-bit offset of its first row, offsets within it, and its mask."""
    r = tl.arange(0, ROWS)[:, None]
    return tl.cast(row, tl.int64) * C, r * C + c[None, :], (r < M - row) & (c < C)[None, :]


@triton.jit
def _load(pointer, base, offsets, inside):
    return tl.load(pointer + base + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _bn_act_kernel(
    y,
    bn,
    residual,
    residual_bn,
    out,
    M,
    C,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    scale = channel_vector(bn, 2, c, C)
    shift = channel_vector(bn, 3, c, C)
    if residual_bn is not None:
        residual_scale = channel_vector(residual_bn, 2, c, C)
        residual_shift = channel_vector(residual_bn, 3, c, C)
    for block in tl.range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
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


@triton.jit
def _bn_bwd_reduce_kernel(
    g,
    y,
    bn,
    out,
    residual,
    residual_bn,
    sums,
    residual_sums,
    M,
    C,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mean = channel_vector(bn, 0, c, C)
    scale = channel_vector(bn, 2, c, C)
    shift = channel_vector(bn, 3, c, C)
    sum_g = tl.zeros((ROWS, CHANNELS), tl.float32)
    centred = tl.zeros((ROWS, CHANNELS), tl.float32)
    if residual is not None:
        residual_mean = channel_vector(residual_bn, 0, c, C)
        residual_centred = tl.zeros((ROWS, CHANNELS), tl.float32)
    # Neighbouring programs read neighbouring blocks of rows, so that the device walks through memory in order.
    for block in tl.range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        base, offsets, inside = _tile(block * ROWS, M, C, c, ROWS)
        grad = _load(g, base, offsets, inside)
        raw = _load(y, base, offsets, inside)
        if out is not None:
            grad = tl.where(_load(out, base, offsets, inside) <= 0, 0.0, grad)
        elif RELU:
            grad = tl.where(tl.fma(raw, scale, shift) <= 0, 0.0, grad)
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


@triton.jit
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
    C,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    scale = channel_vector(bn, 2, c, C)
    if RELU:
        shift = channel_vector(bn, 3, c, C)
    if y is not None:
        slope = channel_vector(grad, 2, c, C)
        offset = channel_vector(grad, 3, c, C)
    if residual_bn is not None:
        residual_scale = channel_vector(residual_bn, 2, c, C)
    if residual is not None:
        residual_slope = channel_vector(residual_grad, 2, c, C)
        residual_offset = channel_vector(residual_grad, 3, c, C)
    for block in tl.range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        base, offsets, inside = _tile(block * ROWS, M, C, c, ROWS)
        through = _load(g, base, offsets, inside)
        if y is not None:
            raw = _load(y, base, offsets, inside)
        if out is not None:
            through = tl.where(_load(out, base, offsets, inside) <= 0, 0.0, through)
        elif RELU:
            through = tl.where(tl.fma(raw, scale, shift) <= 0, 0.0, through)
        result = through
        if y is not None:
            result += tl.fma(raw, slope, offset)
        tl.store(dy + base + offsets, (result * scale).to(dy.dtype.element_ty), mask=inside)
        if dresidual is not None:
            result = through
            if residual is not None:
                result += tl.fma(_load(residual, base, offsets, inside), residual_slope, residual_offset)
            if residual_bn is not None:
                result *= residual_scale
            tl.store(dresidual + base + offsets, result.to(dresidual.dtype.element_ty), mask=inside)


def _rows(t: Tensor) -> int:
    """M; `numel() // C` would divide by zero for no channels."""
    return t.shape[:-1].numel()


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
    rows, channels = _rows(y), y.shape[-1]
    config = CONFIGS[part_of(y.device)]["bn_act"]
    tile = tile_shape(channels, y.element_size(), config)
    grid = (triton.cdiv(channels, tile[1]), splits(rows, channels, *tile, config))
    with on_device(y.device):
        _bn_act_kernel[grid](
            y,
            bn,
            residual,
            residual_bn,
            out,
            rows,
            channels,
            relu,
            *tile,
            config.num_stages,
            num_warps=config.num_warps,
        )
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
    check_activations("bn_bwd_reduce", g=g, y=y, out=out, residual=residual)
    check_vectors("bn_bwd_reduce", y, bn=bn, residual_bn=residual_bn)
    if (residual is None) != (residual_bn is None):
        raise ValueError("bn_bwd_reduce: residual and residual_bn describe one branch: pass both, or neither")
    rows, channels = _rows(y), y.shape[-1]
    config = CONFIGS[part_of(y.device)]["bn_bwd_reduce"]
    tile = tile_shape(channels, y.element_size(), config)
    programs = splits(rows, channels, *tile, config)
    sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=y.device)
    residual_sums = None if residual is None else torch.empty_like(sums)
    grid = (triton.cdiv(channels, tile[1]), programs)
    with on_device(y.device):
        _bn_bwd_reduce_kernel[grid](
            g,
            y,
            bn,
            out,
            residual,
            residual_bn,
            sums,
            residual_sums,
            rows,
            channels,
            relu,
            *tile,
            config.num_stages,
            num_warps=config.num_warps,
        )
    return sums, residual_sums


def bn_bwd_apply(
    g: Tensor,
    y: Tensor | None,
    bn: Tensor,
    grad: Tensor,
    *,
    out: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    residual_bn: Tensor | None = None,
    residual_grad: Tensor | None = None,
    need_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dy and the shortcut's gradient; reads g (y, out, residual), writes dy (dresidual). See the reference.

    Where no ReLU masks g, the gradient of an identity shortcut is g itself and nothing is written for it.

    Raises as `bn_act` does, and ValueError where the mask or a branch lacks a tensor that it is formed from.
    """
    check_activations("bn_bwd_apply", g=g, y=y, out=out, residual=residual)
    check_vectors("bn_bwd_apply", g, bn=bn, grad=grad, residual_bn=residual_bn, residual_grad=residual_grad)
    if relu and out is None and y is None:
        raise ValueError("bn_bwd_apply: the ReLU's mask needs its output or its input: pass out or y")
    if residual is not None and (residual_bn is None or residual_grad is None):
        raise ValueError("bn_bwd_apply: residual needs residual_bn and residual_grad")
    dy = torch.empty_like(g)
    identity_unmasked = residual_bn is None and out is None and not relu
    dresidual = torch.empty_like(g) if need_residual and not identity_unmasked else None
    if g.numel():
        rows, channels = _rows(g), g.shape[-1]
        config = CONFIGS[part_of(g.device)]["bn_bwd_apply"]
        tile = tile_shape(channels, g.element_size(), config)
        grid = (triton.cdiv(channels, tile[1]), splits(rows, channels, *tile, config))
        with on_device(g.device):
            _bn_bwd_apply_kernel[grid](
                g,
                y,
                bn,
                grad,
                out,
                residual if dresidual is not None else None,
                residual_bn,
                residual_grad,
                dy,
                dresidual,
                rows,
                channels,
                relu and out is None,
                *tile,
                config.num_stages,
                num_warps=config.num_warps,
            )
    return dy, g if need_residual and identity_unmasked else dresidual
