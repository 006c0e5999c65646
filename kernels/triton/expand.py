"""The expanding 1x1 conv that ends a bottleneck, with its BN, shortcut and ReLU: one GEMM with an epilogue.

    expand        out = relu(out_scale*(a W^T) + out_shift + shortcut), a = relu(scale*y + shift) formed on load
    expand_wgrad  P = g'^T a, for a projection also g'^T x_s, and sum g'; g' = g behind the ReLU's mask, written once
    expand_dgrad  (g' u + a v + d*a + k) masked by a's ReLU, and the two sums of the batch norm in front

`fastres.kernels.reference.expand` defines every form; docs/arithmetic.md derives them. Layout: dense `[N, H, W, C]`
seen as `[M, C]`, any M and any channel counts; float32, float16 or bfloat16 in memory, float32 in accumulators, vectors
and P.

Bytes moved: every operand and result once, weights and vectors aside, as far as the blocks of channels that share a
row of pixels find it in L2: they have neighbouring numbers. expand_wgrad writes and reads partial sums besides.

Two forms of `expand`. Up to 128 channels of y a program keeps its weights in shared memory and walks over the pixels,
so that loading the next tiles overlaps with all it does: such layers are bound by memory. Wider ones, and a projection
as a second product, compute a tile a program. The projection has an accumulator of its own: to add its product to the
scaled one of the main branch, its scale would have to go into its weights, and round them a second time.

Not used for float64 (the reference serves it), on CPUs, and below compute capability 8.0. float32 multiplies without
TF32, on the cores for scalars: the library is faster where TF32 is allowed.

Deterministic: splits depend on shapes, dtype and part only, and are added in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MULTIPROCESSORS,
    ceil_div,
    check_activations,
    check_dense,
    check_vectors,
    part_of,
    relu,
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
    masked,
    operand,
    part,
    split_count,
    store_tile,
    sum_splits,
    unit,
    units,
)

# By the channels of y. "resident" is `expand` with weights that stay, "project" the one with a second product.
_HOPPER = {
    "expand, resident": {
        64: (Tile(64, 256, 64, 1, 8, 2), Tile(64, 128, 64, 1, 4, 2)),
        128: (Tile(128, 128, 128, 1, 8, 2), Tile(64, 128, 128, 1, 8, 2)),
    },
    "expand": {256: (Tile(128, 256, 64, 2, 8, 3), Tile(128, 128, 64, 2, 8, 3))},
    "expand, project": {256: (Tile(128, 128, 64, 2, 8, 3), Tile(128, 64, 64, 1, 8, 3))},
    "expand_wgrad": {
        64: (Tile(64, 256, 64, 1, 8, 2), Tile(64, 128, 64, 1, 4, 2)),
        128: (Tile(128, 128, 64, 1, 8, 3), Tile(128, 128, 32, 1, 8, 3)),
        256: (Tile(256, 128, 64, 1, 8, 3), Tile(128, 128, 32, 1, 8, 3)),
    },
    "expand_dgrad": {
        64: (Tile(128, 64, 64, 2, 4, 3), Tile(64, 64, 64, 1, 4, 3)),
        256: (Tile(256, 128, 64, 4, 8, 3), Tile(128, 128, 64, 2, 8, 3)),
    },
}
_AMPERE = {
    "expand, resident": {
        64: (Tile(64, 128, 64, 1, 4, 2), Tile(32, 64, 64, 1, 4, 2)),
        128: (Tile(64, 128, 128, 1, 8, 2), Tile(64, 64, 128, 1, 8, 2)),
    },
    "expand": {256: (Tile(128, 128, 64, 1, 8, 3), Tile(128, 64, 32, 1, 8, 3))},
    "expand, project": {256: (Tile(128, 64, 32, 1, 8, 3), Tile(64, 64, 32, 1, 4, 3))},
    "expand_wgrad": {
        64: (Tile(64, 128, 32, 1, 8, 3), Tile(64, 64, 32, 1, 8, 3)),
        128: (Tile(128, 128, 32, 1, 8, 3), Tile(128, 64, 32, 1, 8, 3)),
    },
    "expand_dgrad": {
        64: (Tile(128, 64, 32, 1, 4, 3), Tile(64, 64, 32, 1, 4, 3)),
        256: (Tile(128, 128, 32, 2, 8, 3), Tile(64, 64, 32, 1, 4, 3)),
    },
}
# What spills there, in smaller tiles.
_BLACKWELL = _HOPPER | {
    "expand_wgrad": _HOPPER["expand_wgrad"] | {64: (Tile(64, 128, 64, 1, 8, 3), Tile(64, 128, 64, 1, 4, 2))}
}
CONFIGS = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}
"""By part, form and width."""

RESIDENT_CHANNELS = 128
"""Channels of y up to which all of them fit into one tile, and the weights stay with the program."""

_SIZES = ["M", "k_units", "c_units", "s_units", "H", "W", "HO", "WO"]


@triton.jit
def _shortcut(tile, vectors, c, C):
    """A shortcut's tile in float32; with vectors it is the raw output of a projection: scale*tile + shift."""
    value = tile.to(tl.float32)
    if vectors is not None:
        scale = tl.broadcast_to(row_vector(vectors, 2, c, C)[None, :], value.shape)
        shift = tl.broadcast_to(row_vector(vectors, 3, c, C)[None, :], value.shape)
        value = tl.fma(value, scale, shift)
    return value


@triton.jit(do_not_specialize=["M", "k_units", "c_units", "walkers"])
def _expand_resident_kernel(
    y, bn, weight, out_bn, shortcut, shortcut_bn, out, M, k_units, c_units, walkers,
    K_UNIT: tl.constexpr, C_UNIT: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K = k_units * K_UNIT
    C = c_units * C_UNIT
    blocks = tl.cdiv(C, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS
    channels = c + tl.arange(0, CHANNELS)
    scale = row_vector(out_bn, 2, channels, C)[None, :]
    shift = row_vector(out_bn, 3, channels, C)[None, :]
    w = load_tile(weight, c, 0, C, K, CHANNELS, DEPTH, TMA)
    for step in tl.range(tl.program_id(0) // blocks, tl.cdiv(M, PIXELS), walkers, num_stages=STAGES):
        row = step * PIXELS
        a = activation(load_tile(y, row, 0, M, K, PIXELS, DEPTH, TMA), bn, tl.arange(0, DEPTH), K)
        added = _shortcut(load_tile(shortcut, row, c, M, C, PIXELS, CHANNELS, TMA), shortcut_bn, channels, C)
        # Swapped, and the product turned: the other way round it spills.
        z = tl.dot(w, a.T, input_precision="ieee").T * scale + shift + added
        store_tile(out, relu(z), row, c, M, C, PIXELS, CHANNELS, TMA)


@triton.jit(do_not_specialize=_SIZES)
def _expand_kernel(
    y, bn, weight, out_bn, shortcut, shortcut_bn, shortcut_weight, out, M, k_units, c_units, s_units, H, W, HO, WO,
    K_UNIT: tl.constexpr, C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K = k_units * K_UNIT
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    blocks = tl.cdiv(C, CHANNELS)
    row = tl.program_id(0) // blocks * PIXELS
    first = tl.program_id(0) % blocks * CHANNELS
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for step in tl.range(0, tl.cdiv(K, DEPTH), num_stages=STAGES):
        k = step * DEPTH
        a = activation(load_tile(y, row, k, M, K, PIXELS, DEPTH, TMA), bn, k + tl.arange(0, DEPTH), K)
        w = load_tile(weight, first, k, C, K, CHANNELS, DEPTH, TMA)
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
    if shortcut_weight is not None:
        projected = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for step in tl.range(0, tl.cdiv(S, DEPTH), num_stages=STAGES):
            s = step * DEPTH
            x = load_pixels(shortcut, row, s, M, S, H, W, HO, WO, STRIDE, PIXELS, DEPTH, TMA)
            w = load_tile(shortcut_weight, first, s, C, S, CHANNELS, DEPTH, TMA)
            projected = tl.dot(x, w.T, projected, input_precision="ieee")
    PART: tl.constexpr = CHANNELS // PARTS
    for index in tl.static_range(PARTS):
        c = first + index * PART
        channels = c + tl.arange(0, PART)
        if shortcut_weight is not None:
            added = _shortcut(part(projected, index, PARTS), shortcut_bn, channels, C)
        else:
            added = _shortcut(load_tile(shortcut, row, c, M, C, PIXELS, PART, TMA), shortcut_bn, channels, C)
        scale = row_vector(out_bn, 2, channels, C)[None, :]
        shift = row_vector(out_bn, 3, channels, C)[None, :]
        z = part(acc, index, PARTS) * scale + shift + added
        store_tile(out, relu(z), row, c, M, C, PIXELS, PART, TMA)


@triton.jit(do_not_specialize=[*_SIZES, "splits"])
def _expand_wgrad_kernel(
    g, out, y, bn, x, stored, partials, M, k_units, c_units, s_units, H, W, HO, WO, splits,
    K_UNIT: tl.constexpr, C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K = k_units * K_UNIT
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    k_blocks = tl.cdiv(K, PIXELS)
    c_blocks = tl.cdiv(C, CHANNELS)
    tiles = c_blocks * k_blocks
    if x is not None:
        tiles += c_blocks * tl.cdiv(S, PIXELS)
    split = tl.program_id(0) // tiles
    block = tl.program_id(0) % tiles // c_blocks
    c = tl.program_id(0) % c_blocks * CHANNELS
    # Transposed, [channels of a or x_s, channels of g]: the other way round it spills.
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums = tl.zeros((CHANNELS,), tl.float32)
    of_y = block < k_blocks
    k = block * PIXELS
    channels = k + tl.arange(0, PIXELS)
    if of_y:
        for step in tl.range(split, tl.cdiv(M, DEPTH), splits, num_stages=STAGES):
            row = step * DEPTH
            grad = load_tile(g, row, c, M, C, DEPTH, CHANNELS, TMA)
            if out is not None:
                grad = masked(grad, load_tile(out, row, c, M, C, DEPTH, CHANNELS, TMA))
            # Past the last row a is relu(shift), and g' is zero.
            a = activation(load_tile(y, row, k, M, K, DEPTH, PIXELS, TMA), bn, channels, K)
            sums += tl.sum(grad.to(tl.float32), 0)
            acc = tl.dot(a.T, grad, acc, input_precision="ieee")
            if stored is not None:
                if block == 0:
                    store_tile(stored, grad, row, c, M, C, DEPTH, CHANNELS, TMA)
    elif x is not None:
        k = (block - k_blocks) * PIXELS
        for step in tl.range(split, tl.cdiv(M, DEPTH), splits, num_stages=STAGES):
            row = step * DEPTH
            grad = load_tile(g, row, c, M, C, DEPTH, CHANNELS, TMA)
            if out is not None:
                grad = masked(grad, load_tile(out, row, c, M, C, DEPTH, CHANNELS, TMA))
            a = load_pixels(x, row, k, M, S, H, W, HO, WO, STRIDE, DEPTH, PIXELS, TMA)
            acc = tl.dot(a.T, grad, acc, input_precision="ieee")
    base = partials + tl.cast(split, tl.int64) * (K + S + 1) * C
    if of_y:
        store_tile(base, acc, k, c, K, C, PIXELS, CHANNELS, False)
        if block == 0:
            tl.store(base + (K + S) * C + c + tl.arange(0, CHANNELS), sums, mask=c + tl.arange(0, CHANNELS) < C)
    else:
        store_tile(base + K * C, acc, k, c, S, C, PIXELS, CHANNELS, False)


@triton.jit(do_not_specialize=["M", "k_units", "c_units"])
def _expand_dgrad_kernel(
    g, u, v, v_scale, k_vector, d_vector, y, y_epilogue, bn, dz, sums, M, k_units, c_units,
    K_UNIT: tl.constexpr, C_UNIT: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K = k_units * K_UNIT
    C = c_units * C_UNIT
    blocks = tl.cdiv(K, CHANNELS)
    tile = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * CHANNELS
    row = tile * PIXELS
    acc = tl.zeros((CHANNELS, PIXELS), tl.float32)
    if v is not None:
        for step in tl.range(0, tl.cdiv(K, DEPTH), num_stages=STAGES):
            k = step * DEPTH
            a = activation(load_tile(y, row, k, M, K, PIXELS, DEPTH, TMA), bn, k + tl.arange(0, DEPTH), K)
            weights = load_tile(v, k, first, K, K, DEPTH, CHANNELS, TMA)
            acc = tl.dot(weights.T, a.T, acc, input_precision="ieee")
        if v_scale is not None:
            acc *= tl.load(v_scale)
    for step in tl.range(0, tl.cdiv(C, DEPTH), num_stages=STAGES):
        c = step * DEPTH
        weights = load_tile(u, c, first, C, K, DEPTH, CHANNELS, TMA)
        acc = tl.dot(weights.T, load_tile(g, row, c, M, C, PIXELS, DEPTH, TMA).T, acc, input_precision="ieee")
    PART: tl.constexpr = PIXELS // PARTS
    channels = first + tl.arange(0, CHANNELS)
    total = tl.zeros((CHANNELS,), tl.float32)
    centred = tl.zeros((CHANNELS,), tl.float32)
    for index in tl.static_range(PARTS):
        m = row + index * PART
        raw = load_tile(y_epilogue, m, first, M, K, PART, CHANNELS, TMA).T.to(tl.float32)
        scale = tl.broadcast_to(row_vector(bn, 2, channels, K)[:, None], raw.shape)
        shift = tl.broadcast_to(row_vector(bn, 3, channels, K)[:, None], raw.shape)
        value = part(acc, index, PARTS)
        if k_vector is not None:
            value += tl.load(k_vector + channels, mask=channels < K, other=0.0)[:, None]
        z = tl.fma(raw, scale, shift)
        if d_vector is not None:
            d = tl.load(d_vector + channels, mask=channels < K, other=0.0)
            a = relu(z).to(dz.dtype if TMA else dz.dtype.element_ty).to(tl.float32)
            value = tl.fma(tl.broadcast_to(d[:, None], a.shape), a, value)
        stops = (z <= 0) | (tl.arange(0, PART) >= M - m)[None, :]
        rounded = tl.where(stops, 0.0, value).to(dz.dtype if TMA else dz.dtype.element_ty)
        value = rounded.to(tl.float32)
        total += tl.sum(value, 1)
        centred += tl.sum(value * (raw - row_vector(bn, 0, channels, K)[:, None]), 1)
        store_tile(dz, rounded.T, m, first, M, K, PART, CHANNELS, TMA)
    at = tl.cast(tile, tl.int64) * 2 * K + channels
    tl.store(sums + at, total, mask=channels < K)
    tl.store(sums + at + K, centred, mask=channels < K)


def expand(
    y: Tensor,
    bn: Tensor,
    weight: Tensor,
    out_bn: Tensor,
    shortcut: Tensor,
    *,
    shortcut_bn: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    """out = relu(out_scale*(a W^T) + out_shift + shortcut); reads y and shortcut, writes out. See the reference.

    Raises TypeError for a dtype that Triton kernels do not take, ValueError for memory that is not dense and for shapes
    and devices that do not fit.
    """
    kernel = "expand"
    check_activations(kernel, y=y)
    check_vectors(kernel, y, bn=bn)
    c, k = weight.shape[0], y.shape[-1]
    check_dense(kernel, (c, k), (y.dtype,), y.device, weight=weight)
    out = torch.empty(*y.shape[:3], c, dtype=y.dtype, device=y.device)
    check_vectors(kernel, out, out_bn=out_bn, shortcut_bn=shortcut_bn)
    if shortcut_weight is None:
        check_activations(kernel, out=out, shortcut=shortcut)
    else:
        check_strided(kernel, "shortcut", shortcut, "y", y, stride)
        check_dense(kernel, (c, shortcut.shape[-1]), (y.dtype,), y.device, shortcut_weight=shortcut_weight)
        if shortcut_bn is None:
            raise ValueError("expand: shortcut_weight needs shortcut_bn: pass both, or neither")
    if out.numel() == 0:
        return out
    rows, s = y.shape[:3].numel(), shortcut.shape[-1]
    part = part_of(y.device)
    tma = has_tma(part, y, weight, shortcut, shortcut_weight, out)

    def launch_resident(tile: Tile):
        blocks = ceil_div(c, tile.channels)
        walkers = max(1, min(ceil_div(rows, tile.pixels), MULTIPROCESSORS[part] * (8 // tile.num_warps) // blocks))
        compiled = _expand_resident_kernel[(blocks * walkers,)](
            operand(y, tile.pixels, tile.depth, tma),
            bn,
            operand(weight, tile.channels, tile.depth, tma),
            out_bn,
            operand(shortcut, tile.pixels, tile.channels, tma),
            shortcut_bn,
            operand(out, tile.pixels, tile.channels, tma),
            rows,
            *units(k, c),
            walkers,
            *unit(k, c),
            tma,
            **tile.constants,
        )
        return out, compiled

    def launch(tile: Tile):
        part_channels = tile.channels // tile.parts
        if shortcut_weight is None:
            second = operand(shortcut, tile.pixels, part_channels, tma)
        else:
            second = operand(shortcut, tile.pixels, tile.depth, tma and stride == 1)
        compiled = _expand_kernel[(ceil_div(rows, tile.pixels) * ceil_div(c, tile.channels),)](
            operand(y, tile.pixels, tile.depth, tma),
            bn,
            operand(weight, tile.channels, tile.depth, tma),
            out_bn,
            second,
            shortcut_bn,
            operand(shortcut_weight, tile.channels, tile.depth, tma),
            operand(out, tile.pixels, part_channels, tma),
            rows,
            *units(k, c, s),
            *(*shortcut.shape[1:3], *y.shape[1:3]),
            *unit(k, c, s),
            stride,
            tma,
            **tile.constants,
        )
        return out, compiled

    resident = shortcut_weight is None and k <= RESIDENT_CHANNELS and y.dtype != torch.float32
    form = "expand, project" if shortcut_weight is not None else "expand, resident" if resident else "expand"
    return choose(form, choices(CONFIGS, form, y, k, tma), y, launch_resident if resident else launch)


def expand_wgrad(
    g: Tensor, out: Tensor | None, y: Tensor, bn: Tensor, *, x: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """P, sum g', g' and, with x, g'^T x_s; reads g, out, y (x), writes g' and partial sums, which a second launch adds
    up. P and g'^T x_s are transposed views. See the reference.

    Raises as `expand` does.
    """
    kernel = "expand_wgrad"
    check_activations(kernel, g=g, out=out)
    check_strided(kernel, "y", y, "g", g, 1)
    check_vectors(kernel, y, bn=bn)
    if x is not None:
        check_strided(kernel, "x", x, "g", g, stride)
    c, k, s = g.shape[-1], y.shape[-1], 0 if x is None else x.shape[-1]
    stored = None if out is None else torch.empty_like(g)
    rows = g.shape[:3].numel()
    part = part_of(g.device)
    tma = has_tma(part, g, out, y, x)

    def launch(tile: Tile):
        tiles = ceil_div(c, tile.channels) * (ceil_div(k, tile.pixels) + ceil_div(s, tile.pixels))
        splits = split_count(ceil_div(rows, tile.depth), tiles, MULTIPROCESSORS[part])
        partials = torch.empty(splits, k + s + 1, c, dtype=torch.float32, device=g.device)
        compiled = _expand_wgrad_kernel[(tiles * splits,)](
            operand(g, tile.depth, tile.channels, tma),
            operand(out, tile.depth, tile.channels, tma),
            operand(y, tile.depth, tile.pixels, tma),
            bn,
            operand(x, tile.depth, tile.pixels, tma and stride == 1),
            operand(stored, tile.depth, tile.channels, tma),
            partials,
            rows,
            *units(k, c, s),
            *(y if x is None else x).shape[1:3],
            *g.shape[1:3],
            splits,
            *unit(k, c, s),
            stride,
            tma,
            **tile.constants,
        )
        return partials, compiled

    if rows == 0:
        sums = torch.zeros(k + s + 1, c, dtype=torch.float32, device=g.device)
    else:
        sums = sum_splits(choose(kernel, choices(CONFIGS, kernel, g, k, tma), g, launch))
    return sums[:k].T, sums[-1], g if stored is None else stored, None if x is None else sums[k:-1].T


def expand_dgrad(
    g: Tensor,
    u: Tensor,
    v: Tensor | None,
    k: Tensor | None,
    y: Tensor,
    bn: Tensor,
    v_scale: Tensor | None = None,
    d: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient in front of `bn` and its sums, a partial for each tile of pixels; reads g and y, writes dz. See the
    reference.

    Raises as `expand` does.
    """
    kernel = "expand_dgrad"
    check_strided(kernel, "y", y, "g", g, 1)
    check_vectors(kernel, y, bn=bn)
    channels, c = y.shape[-1], g.shape[-1]
    check_dense(kernel, (c, channels), (g.dtype,), g.device, u=u)
    check_dense(kernel, (channels, channels), (g.dtype,), g.device, v=v)
    check_dense(kernel, (channels,), (torch.float32,), g.device, k=k, d=d)
    check_dense(kernel, (), (torch.float32,), g.device, v_scale=v_scale)
    if v is None and not k is d is v_scale is None:
        raise ValueError("expand_dgrad: k, d and v_scale belong to v: pass it too, or none of them")
    dz = torch.empty_like(y)
    rows = y.shape[:3].numel()
    if dz.numel() == 0:
        return dz, torch.zeros(1, 2, channels, dtype=torch.float32, device=g.device)
    tma = has_tma(part_of(g.device), g, y, u)

    def launch(tile: Tile):
        tiles, part_pixels = ceil_div(rows, tile.pixels), tile.pixels // tile.parts
        sums = torch.empty(tiles, 2, channels, dtype=torch.float32, device=g.device)
        compiled = _expand_dgrad_kernel[(tiles * ceil_div(channels, tile.channels),)](
            operand(g, tile.pixels, tile.depth, tma),
            operand(u, tile.depth, tile.channels, tma),
            operand(v, tile.depth, tile.channels, tma),
            v_scale,
            k,
            d,
            operand(None if v is None else y, tile.pixels, tile.depth, tma),
            operand(y, part_pixels, tile.channels, tma),
            bn,
            operand(dz, part_pixels, tile.channels, tma),
            sums,
            rows,
            *units(channels, c),
            *unit(channels, c),
            tma,
            **tile.constants,
        )
        return (dz, sums), compiled

    return choose(kernel, choices(CONFIGS, kernel, g, channels, tma), g, launch)
