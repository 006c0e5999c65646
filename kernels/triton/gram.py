"""Gram folding: second moments of a GEMM's input, and the small matrices of both directions in few launches.

    gram           sum (a-p)^T (a-p) and sum (a-p) over the pixels, a = relu(scale*y + shift) formed on load
    gram_finalize  the batch norm of a W^T from them: `bn`, running statistics, mean and centred scatter, in two
                   launches
    gram_bwd       dW, dgamma, dbeta and the operands u, v, k, d of the gradient of a, in four launches

`fastres.kernels.reference.gram` defines every form; docs/arithmetic.md derives them.

gram computes the blocks on and above the diagonal, split over M so that no float32 sum has more than 4,096 rows
(docs/arithmetic.md, "Sums that are truncated"); a second launch adds the splits in their order and mirrors them. Rows
past the last one are masked: relu(shift) is not zero there. In float32 the pivot is relu(beta), beta = shift +
scale*mean being the mean of a's input: what a's mean tends to where it is far above its standard deviation. In float16
and bfloat16 it is 0: rounding it off the operands would cost more than it saves.

The small products multiply 16-bit weights by float32 matrices as three TF32 products, which keep float32's digits:
those of W are TF32's already, the other factor is split in two. For float32 activations they are float32's.

Bytes moved: n + 1 times y for n blocks of 128 channels, once for one block (twice on sm_100), and `[K, K]` and `[N, K]`
matrices that lie in L2.

Not used for float64 (the reference serves it), on CPUs, and below compute capability 8.0.

Deterministic: splits depend on shapes, dtype and part only, and are added in their order. No value is read by the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.gram import Gram
from ._common import (
    DTYPES,
    MULTIPROCESSORS,
    ceil_div,
    check_activations,
    check_dense,
    check_device,
    check_vectors,
    on_device,
    part_of,
    relu,
    row_vector,
)
from ._gemm import (
    Tile,
    activation,
    choices,
    choose,
    has_tma,
    load_tile,
    operand,
    precision,
    split_count,
    store_tile,
    unit,
    units,
)
from .batch_norm import check_running, move_running, store_bn

_HOPPER = {
    "gram": {
        64: (Tile(64, 64, 64, 1, 4, 4), Tile(64, 64, 64, 1, 4, 3)),
        128: (Tile(128, 128, 64, 1, 8, 4), Tile(64, 64, 64, 1, 4, 3)),
    }
}
_AMPERE = {
    "gram": {
        64: (Tile(64, 64, 64, 1, 4, 4), Tile(64, 64, 32, 1, 4, 3)),
        128: (Tile(128, 128, 64, 1, 8, 3), Tile(64, 64, 32, 1, 4, 3)),
    }
}
CONFIGS = {80: _AMPERE, 90: _HOPPER, 100: _HOPPER}
"""By part, form and width."""
_FLOAT32 = (Tile(64, 64, 16, 1, 8, 3), Tile(32, 32, 16, 1, 4, 2))

MOST_ROWS = 4096
"""Rows in one float32 sum of products, which tensor cores truncate."""


@triton.jit
def _block_of(index):
    """The index-th block (i, j), i <= j, column by column."""
    j = ((tl.sqrt_rn(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    return index - j * (j + 1) // 2, j


@triton.jit
def _pivot(bn, c, K, PIVOT: tl.constexpr):
    if PIVOT:
        pivot = relu(tl.fma(row_vector(bn, 0, c, K), row_vector(bn, 2, c, K), row_vector(bn, 3, c, K)))
    else:
        pivot = tl.zeros(c.shape, tl.float32)
    return pivot


@triton.jit
def _centred_activation(y, live, bn, pivot, c, K, PIVOT: tl.constexpr):
    """a - pivot of a tile of y, rounded to y's dtype; zero where not live, and past the last channel."""
    a = activation(y, bn, c, K)
    if PIVOT:
        a = (a.to(tl.float32) - pivot[None, :]).to(y.dtype)
    return tl.where(live, a, 0.0).to(y.dtype)


@triton.jit(do_not_specialize=["M", "k_units", "splits"])
def _gram_kernel(
    y, bn, partials, totals, M, k_units, splits,
    K_UNIT: tl.constexpr, PIVOT: tl.constexpr, ONE_TILE: tl.constexpr, TMA: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K = k_units * K_UNIT
    side = tl.cdiv(K, CHANNELS)
    blocks = side * (side + 1) // 2
    split = tl.program_id(0) // blocks
    i, j = _block_of(tl.program_id(0) % blocks)
    first = i * PIXELS + tl.arange(0, PIXELS)
    second = j * CHANNELS + tl.arange(0, CHANNELS)
    first_pivot = _pivot(bn, first, K, PIVOT)
    second_pivot = _pivot(bn, second, K, PIVOT)
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)
    for step in tl.range(split, tl.cdiv(M, DEPTH), splits, num_stages=STAGES):
        live = (tl.arange(0, DEPTH) < M - step * DEPTH)[:, None]
        tile = load_tile(y, step * DEPTH, i * PIXELS, M, K, DEPTH, PIXELS, TMA)
        a = _centred_activation(tile, live, bn, first_pivot, first, K, PIVOT)
        total += tl.sum(a.to(tl.float32), 0)
        b = a
        if not ONE_TILE:
            tile = load_tile(y, step * DEPTH, j * CHANNELS, M, K, DEPTH, CHANNELS, TMA)
            b = _centred_activation(tile, live, bn, second_pivot, second, K, PIVOT)
        acc = tl.dot(a.T, b, acc, input_precision="ieee")
    r = tl.arange(0, PIXELS)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tl.store(partials + tl.cast(tl.program_id(0), tl.int64) * PIXELS * CHANNELS + r, acc)
    if i == j:
        tl.store(totals + split * K + first, total, mask=first < K)


@triton.jit(do_not_specialize=["k_units", "splits"])
def _gram_combine_kernel(
    partials, totals, bn, gram, total, pivot, k_units, splits,
    K_UNIT: tl.constexpr, PIVOT: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows program_id(1) of block program_id(0)."""
    K = k_units * K_UNIT
    side = tl.cdiv(K, CHANNELS)
    blocks = side * (side + 1) // 2
    i, j = _block_of(tl.program_id(0))
    first = tl.program_id(1) * ROWS
    e = tl.arange(0, ROWS * CHANNELS)
    rows = i * CHANNELS + first + tl.arange(0, ROWS)
    acc = tl.zeros((SPLITS, ROWS * CHANNELS), tl.float32)
    sums = tl.zeros((SPLITS, ROWS), tl.float32)
    for step in tl.range(0, tl.cdiv(splits, SPLITS), num_stages=STAGES):
        split = step * SPLITS + tl.arange(0, SPLITS)
        present = (split < splits)[:, None]
        at = ((tl.cast(split, tl.int64) * blocks + tl.program_id(0)) * CHANNELS + first) * CHANNELS
        acc += tl.load(partials + at[:, None] + e[None, :], mask=present, other=0.0)
        at = tl.cast(split, tl.int64) * K
        sums += tl.load(totals + at[:, None] + rows[None, :], mask=present & (rows < K)[None, :], other=0.0)
    value = tl.sum(acc, 0)
    row = i * CHANNELS + first + e // CHANNELS
    column = j * CHANNELS + e % CHANNELS
    inside = (row < K) & (column < K)
    tl.store(gram + tl.cast(row, tl.int64) * K + column, value, mask=inside)
    if i != j:
        tl.store(gram + tl.cast(column, tl.int64) * K + row, value, mask=inside)
    else:
        tl.store(total + rows, tl.sum(sums, 0), mask=rows < K)
        tl.store(pivot + rows, _pivot(bn, rows, K, PIVOT), mask=rows < K)


@triton.jit
def _scatter_tile(gram, total, i, j, K, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at (i, j) of gram - total total^T/count; zero past its end."""
    r = i + tl.arange(0, ROWS)
    c = j + tl.arange(0, COLUMNS)
    inside = (r < K)[:, None] & (c < K)[None, :]
    value = tl.load(gram + tl.cast(r, tl.int64)[:, None] * K + c[None, :], mask=inside, other=0.0)
    rows = tl.load(total + r, mask=r < K, other=0.0)
    columns = tl.load(total + c, mask=c < K, other=0.0)
    return tl.fma(-tl.broadcast_to(rows[:, None], value.shape), (tl.div_rn(columns, count))[None, :], value)


@triton.jit(do_not_specialize=["n_units", "k_units"])
def _gram_moments_kernel(
    gram, total, pivot, conv_weight, partials, mean, scatter, count, n_units, k_units,
    N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of rows program_id(0) of W, what columns program_id(1) add to M*var and to the mean of a W^T."""
    N = n_units * N_UNIT
    K = k_units * K_UNIT
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.range(0, tl.cdiv(K, COLUMNS), num_stages=STAGES):
        w = load_tile(conv_weight, row, i * COLUMNS, N, K, ROWS, COLUMNS, False)
        tile = _scatter_tile(gram, total, i * COLUMNS, column, K, count, COLUMNS, COLUMNS)
        product = tl.dot(w.to(tl.float32), tile, product, input_precision=PRECISION)
        # The programs share the writing of what they all have to form.
        if i % tl.num_programs(0) == tl.program_id(0):
            store_tile(scatter, tile, i * COLUMNS, column, K, K, COLUMNS, COLUMNS, False)
    w = load_tile(conv_weight, row, column, N, K, ROWS, COLUMNS, False).to(tl.float32)
    centre = tl.load(total + columns, mask=columns < K, other=0.0)
    centre = tl.load(pivot + columns, mask=columns < K, other=0.0) + tl.div_rn(centre, count)
    n = row + tl.arange(0, ROWS)
    at = tl.program_id(1) * 2 * N + n
    tl.store(partials + at, tl.sum(product * w, 1), mask=n < N)
    tl.store(partials + at + N, tl.sum(w * centre[None, :], 1), mask=n < N)
    if tl.program_id(0) == 0:
        tl.store(mean + columns, centre, mask=columns < K)


@triton.jit(do_not_specialize=["n_units", "groups"])
def _gram_finalize_kernel(
    partials, weight, bias, running_mean, running_var, num_batches_tracked, bn, count, momentum, eps, n_units, groups,
    N_UNIT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    N = n_units * N_UNIT
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    mean = tl.zeros((CHANNELS,), tl.float32)
    for group in tl.range(0, groups, num_stages=3):
        m2 += tl.load(partials + group * 2 * N + n, mask=n < N, other=0.0)
        mean += tl.load(partials + group * 2 * N + N + n, mask=n < N, other=0.0)
    # Rounding can push the variance of a constant channel below zero.
    m2 = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    store_bn(bn, mean, tl.div_rn(m2, count), weight, bias, eps, n, N)
    move_running(running_mean, running_var, num_batches_tracked, mean, m2, count, momentum, n, N)


@triton.jit
def _centred_p(p, sum_g, mean, n, columns, N, K, p_rows, p_columns):
    """The tile of p - sum_g mean^T at rows n and columns; p itself without a mean."""
    inside = (n < N)[:, None] & (columns < K)[None, :]
    value = tl.load(p + tl.cast(n, tl.int64)[:, None] * p_rows + columns[None, :] * p_columns, mask=inside, other=0.0)
    if mean is not None:
        centre = tl.load(mean + columns, mask=columns < K, other=0.0)
        dbeta = tl.load(sum_g + n, mask=n < N, other=0.0)
        value = tl.fma(-tl.broadcast_to(dbeta[:, None], value.shape), centre[None, :], value)
    return value


@triton.jit
def _store_partial(partials, index, of_k, of_d, columns, K):
    """What one program adds to k and to d's numerator."""
    at = partials + tl.cast(index, tl.int64) * 2 * K + columns
    tl.store(at, of_k, mask=columns < K)
    tl.store(at + K, of_d, mask=columns < K)


@triton.jit(do_not_specialize=["n_units", "k_units", "p_rows", "p_columns"])
def _gram_bwd_vectors_kernel(
    p, sum_g, conv_weight, bn, mean, grad, u, partials, bounds, count, n_units, k_units, p_rows, p_columns,
    N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`grad` and u of rows n, and what these add to k, to d and to the bounds of v."""
    N = n_units * N_UNIT
    K = k_units * K_UNIT
    row = tl.program_id(0) * ROWS
    n = row + tl.arange(0, ROWS)
    projected = tl.zeros((ROWS,), tl.float32)
    for column in tl.range(0, K, COLUMNS, num_stages=STAGES):
        columns = column + tl.arange(0, COLUMNS)
        w = load_tile(conv_weight, row, column, N, K, ROWS, COLUMNS, False).to(tl.float32)
        projected += tl.sum(_centred_p(p, sum_g, mean, n, columns, N, K, p_rows, p_columns) * w, 1)
    dbeta = tl.load(sum_g + n, mask=n < N, other=0.0)
    mean_y = row_vector(bn, 0, n, N)
    rstd = row_vector(bn, 1, n, N)
    scale = row_vector(bn, 2, n, N)
    if mean is None:
        projected -= mean_y * dbeta
    dgamma = rstd * projected
    slope = tl.zeros_like(dgamma)
    offset = tl.zeros_like(dgamma)
    if mean is not None:
        slope = tl.div_rn(-rstd * dgamma, count)
        offset = -tl.fma(mean_y, slope, tl.div_rn(dbeta, count))
    tl.store(grad + n, dgamma, mask=n < N)
    tl.store(grad + N + n, dbeta, mask=n < N)
    tl.store(grad + 2 * N + n, slope, mask=n < N)
    tl.store(grad + 3 * N + n, offset, mask=n < N)
    for column in tl.range(0, K, COLUMNS, num_stages=STAGES):
        columns = column + tl.arange(0, COLUMNS)
        w = load_tile(conv_weight, row, column, N, K, ROWS, COLUMNS, False).to(tl.float32)
        exact = scale[:, None] * w
        rounded = exact.to(u.dtype.element_ty)
        store_tile(u, rounded, row, column, N, K, ROWS, COLUMNS, False)
        if mean is not None:
            read = rounded.to(tl.float32)
            of_k = tl.sum(read * tl.div_rn(dbeta, count)[:, None], 0)
            centred = _centred_p(p, sum_g, mean, n, columns, N, K, p_rows, p_columns)
            _store_partial(partials, tl.program_id(0), -of_k, tl.sum((exact - read) * centred, 0), columns, K)
            if bounds is not None:
                at = tl.cast(tl.program_id(0), tl.int64) * K + columns
                tl.store(bounds + at, tl.sum(tl.abs(scale * slope)[:, None] * w * w, 0), mask=columns < K)


@triton.jit(do_not_specialize=["n_units", "k_units", "p_rows", "p_columns"])
def _gram_bwd_wgrad_kernel(
    p, sum_g, conv_weight, bn, grad, mean, scatter, dw, n_units, k_units, p_rows, p_columns,
    N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The tile of dW = scale*(p - sum_g mean^T + b*(W scatter)) at (program_id(0), program_id(1))."""
    N = n_units * N_UNIT
    K = k_units * K_UNIT
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS
    n = row + tl.arange(0, ROWS)
    value = _centred_p(p, sum_g, mean, n, column + tl.arange(0, COLUMNS), N, K, p_rows, p_columns)
    if scatter is not None:
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.range(0, tl.cdiv(K, COLUMNS), num_stages=STAGES):
            w = load_tile(conv_weight, row, i * COLUMNS, N, K, ROWS, COLUMNS, False)
            tile = load_tile(scatter, i * COLUMNS, column, K, K, COLUMNS, COLUMNS, False)
            product = tl.dot(w.to(tl.float32), tile, product, input_precision=PRECISION)
        value = tl.fma(product, tl.broadcast_to(row_vector(grad, 2, n, N)[:, None], product.shape), value)
    store_tile(dw, row_vector(bn, 2, n, N)[:, None] * value, row, column, N, K, ROWS, COLUMNS, False)


@triton.jit(do_not_specialize=["n_units", "k_units", "row_programs"])
def _gram_bwd_square_kernel(
    conv_weight, bn, grad, mean, scatter, bounds, v, v_scale, partials, n_units, k_units, row_programs,
    N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A block of v = W^T (scale*b*W), and what it adds to k and d."""
    N = n_units * N_UNIT
    K = k_units * K_UNIT
    i = tl.program_id(0)
    j = tl.program_id(1)
    acc = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for step in tl.range(0, tl.cdiv(N, ROWS), num_stages=STAGES):
        n = step * ROWS + tl.arange(0, ROWS)
        first = load_tile(conv_weight, step * ROWS, i * COLUMNS, N, K, ROWS, COLUMNS, False).to(tl.float32)
        second = load_tile(conv_weight, step * ROWS, j * COLUMNS, N, K, ROWS, COLUMNS, False).to(tl.float32)
        second *= (row_vector(bn, 2, n, N) * row_vector(grad, 2, n, N))[:, None]
        acc = tl.dot(first.T, second, acc, input_precision=PRECISION)
    factor = 1.0
    if bounds is not None:
        # |v| is at most the largest of the sums of |scale*b|*W**2 (Cauchy-Schwarz): put that just below 2**15.
        largest = 0.0
        for start in tl.range(0, K, COLUMNS):
            bound = tl.zeros((COLUMNS,), tl.float32)
            for row in tl.range(0, row_programs, ROWS):
                bound += tl.sum(load_tile(bounds, row, start, row_programs, K, ROWS, COLUMNS, False), 0)
            largest = tl.maximum(largest, tl.max(bound, 0))
        exponent = tl.ceil(tl.log2(tl.maximum(largest, 2.0**-110)))
        factor = tl.exp2(14.0 - exponent)
        if (i == 0) & (j == 0):
            tl.store(v_scale, tl.exp2(exponent - 14.0))
    rounded = (acc * factor).to(v.dtype.element_ty)
    store_tile(v, rounded, i * COLUMNS, j * COLUMNS, K, K, COLUMNS, COLUMNS, False)
    read = rounded.to(tl.float32) / factor
    rows = i * COLUMNS + tl.arange(0, COLUMNS)
    columns = j * COLUMNS + tl.arange(0, COLUMNS)
    centre = tl.load(mean + rows, mask=rows < K, other=0.0)
    of_k = tl.sum(centre[:, None] * read, 0)
    tile = load_tile(scatter, i * COLUMNS, j * COLUMNS, K, K, COLUMNS, COLUMNS, False)
    _store_partial(partials, row_programs + i, -of_k, tl.sum((acc - read) * tile, 0), columns, K)


@triton.jit(do_not_specialize=["count", "k_units"])
def _gram_bwd_offsets_kernel(
    partials, mean, scatter, k, d, count, k_units,
    K_UNIT: tl.constexpr, PARTIALS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """k and d from the partials of both, `[count, 2, K]`."""
    K = k_units * K_UNIT
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    of_k = tl.zeros((COLUMNS,), tl.float32)
    of_d = tl.zeros((COLUMNS,), tl.float32)
    for step in tl.range(0, tl.cdiv(count, PARTIALS), num_stages=STAGES):
        first = step * PARTIALS + tl.arange(0, PARTIALS)
        inside = (first < count)[:, None] & (columns < K)[None, :]
        at = partials + tl.cast(first, tl.int64)[:, None] * 2 * K + columns[None, :]
        of_k += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        of_d += tl.sum(tl.load(at + K, mask=inside, other=0.0), 0)
    if d is not None:
        variance = tl.load(scatter + tl.cast(columns, tl.int64) * (K + 1), mask=columns < K, other=0.0)
        slope = tl.where(variance <= 0, 0.0, tl.div_rn(of_d, tl.where(variance <= 0, 1.0, variance)))
        tl.store(d + columns, slope, mask=columns < K)
        of_k -= slope * tl.load(mean + columns, mask=columns < K, other=0.0)
    tl.store(k + columns, of_k, mask=columns < K)


class SmallTile(NamedTuple):
    """Of the small matrices: rows of W and columns of a tile, and stages of the loop over the product's inner index."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# All of it lies in L2: many programs hide latency better than large tiles reuse what they read. By whether the weights
# are float32, whose products are not for the tensor cores.
SMALL = {False: SmallTile(32, 32, 4, 2), True: SmallTile(32, 16, 4, 2)}


def gram(y: Tensor, bn: Tensor) -> Gram:
    """Second moments of a = relu(scale*y + shift); reads y, writes partial sums, which a second launch adds up. See the
    reference.

    Raises TypeError for a dtype that Triton kernels do not take, ValueError for memory that is not dense and for `bn`
    that does not fit.
    """
    check_activations("gram", y=y)
    check_vectors("gram", y, bn=bn)
    rows, k = y.shape[:3].numel(), y.shape[-1]
    moments = Gram(*(torch.empty(size, dtype=torch.float32, device=y.device) for size in ((k, k), (k,), (k,))))
    if rows == 0:
        return Gram(*(t.zero_() for t in moments))
    part, pivot = part_of(y.device), y.dtype == torch.float32
    tma = has_tma(part, y)

    def launch(tile: Tile):
        side = ceil_div(k, tile.channels)
        # Where all channels fit into one block. The blocks on the diagonal of several are few, and load their tile
        # twice; so does sm_100, for which Triton 3.6 does not compile a product of a tile with itself.
        one_tile = side == 1 and part < 100
        blocks = side * (side + 1) // 2
        least = ceil_div(rows, MOST_ROWS)
        splits = split_count(ceil_div(rows, tile.depth), blocks, MULTIPROCESSORS[part], least)
        partials = torch.empty(splits, blocks, tile.channels, tile.channels, dtype=torch.float32, device=y.device)
        totals = torch.empty(splits, k, dtype=torch.float32, device=y.device)
        compiled = _gram_kernel[(blocks * splits,)](
            operand(y, tile.depth, tile.channels, tma),
            bn,
            partials,
            totals,
            rows,
            *units(k),
            splits,
            *unit(k),
            pivot,
            one_tile,
            tma,
            **tile.constants,
        )
        return (partials, totals), compiled

    partials, totals = choose("gram", choices(CONFIGS, "gram", y, k, tma, _FLOAT32), y, launch)
    splits, blocks, channels, _ = partials.shape
    with on_device(y.device):
        rows = 512 // channels  # 4 values and 16 splits a thread
        _gram_combine_kernel[(blocks, channels // rows)](
            partials, totals, bn, *moments, *units(k), splits, *unit(k), pivot, channels, rows, 16, 2, num_warps=4
        )
    return moments


def gram_finalize(
    moments: Gram,
    count: int,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bn`, mean and scatter from second moments in float32, and running statistics moved in place, in two launches.
    See the reference.

    Parameters and running statistics may be float32, float16 or bfloat16. With momentum None another launch counts the
    batch before.

    Raises ValueError where an argument is not dense or does not fit the others' shapes and device, for one running
    statistic without the other, and for a cumulative average (momentum None) without num_batches_tracked.
    """
    kernel = "gram_finalize"
    n, k = conv_weight.shape
    device = conv_weight.device
    check_device(kernel, "conv_weight", conv_weight)
    check_dense(kernel, (n, k), DTYPES, device, conv_weight=conv_weight)
    named = {f"moments.{name}": t for name, t in moments._asdict().items()}
    check_dense(kernel, (k, k), (torch.float32,), device, **{"moments.gram": named.pop("moments.gram")})
    check_dense(kernel, (k,), (torch.float32,), device, **named)
    check_running(kernel, device, n, weight, bias, running_mean, running_var, num_batches_tracked, momentum)
    bn = torch.empty(4, n, dtype=torch.float32, device=device)
    mean, scatter = torch.empty_like(moments.total), torch.empty_like(moments.gram)
    small = SMALL[conv_weight.dtype == torch.float32]
    groups = ceil_div(k, small.columns)
    partials = torch.empty(groups, 2, n, dtype=torch.float32, device=device)
    rows = float(count)  # as a float, of which Triton compiles no variants by value
    with on_device(device):
        _gram_moments_kernel[(ceil_div(n, small.rows), groups)](
            *moments,
            conv_weight,
            partials,
            mean,
            scatter,
            rows,
            *units(n, k),
            *unit(n, k),
            precision(conv_weight.dtype),
            small.rows,
            small.columns,
            small.num_stages,
            num_warps=small.num_warps,
        )
        block = 128  # a value per thread
        _gram_finalize_kernel[(ceil_div(n, block),)](
            partials,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            bn,
            rows,
            momentum,
            eps,
            *units(n),
            groups,
            *unit(n),
            block,
            num_warps=4,
        )
    return bn, mean, scatter


def gram_bwd(
    p: Tensor,
    sum_g: Tensor,
    conv_weight: Tensor,
    bn: Tensor,
    count: int,
    mean: Tensor | None = None,
    scatter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dW, `grad`, u, v, k, v_scale and d in four launches, or in two for constant statistics. See the reference.

    p may have any strides. Raises ValueError where an argument does not fit the others' shapes and device.
    """
    kernel = "gram_bwd"
    n, k = conv_weight.shape
    device = conv_weight.device
    check_device(kernel, "conv_weight", conv_weight)
    check_dense(kernel, (n, k), DTYPES, device, conv_weight=conv_weight)
    check_dense(kernel, (n,), (torch.float32,), device, sum_g=sum_g)
    check_dense(kernel, (4, n), (torch.float32,), device, bn=bn)
    check_dense(kernel, (k,), (torch.float32,), device, mean=mean)
    check_dense(kernel, (k, k), (torch.float32,), device, scatter=scatter)
    if p.shape != (n, k) or p.dtype != torch.float32 or p.device != device:
        raise ValueError(
            f"{kernel}: p must be float32 [{n}, {k}] on {device}, is {p.dtype} {tuple(p.shape)} on {p.device}"
        )
    dw, grad, u = (
        torch.empty(n, k, dtype=torch.float32, device=device),
        torch.empty_like(bn),
        torch.empty_like(conv_weight),
    )
    small, rows = SMALL[conv_weight.dtype == torch.float32], float(count)
    programs, blocks = ceil_div(n, small.rows), ceil_div(k, small.columns)
    partials = bounds = v = v_scale = None
    if scatter is not None:
        partials = torch.empty(programs + blocks, 2, k, dtype=torch.float32, device=device)
        v = torch.empty(k, k, dtype=conv_weight.dtype, device=device)
        if conv_weight.dtype == torch.float16:
            bounds = torch.empty(programs, k, dtype=torch.float32, device=device)
            v_scale = torch.empty((), dtype=torch.float32, device=device)
    tile = small.rows, small.columns, small.num_stages
    sizes = *units(n, k), *p.stride(), *unit(n, k)
    with on_device(device):
        _gram_bwd_vectors_kernel[(programs,)](
            p, sum_g, conv_weight, bn, mean, grad, u, partials, bounds, rows, *sizes, *tile, num_warps=small.num_warps
        )
        _gram_bwd_wgrad_kernel[(programs, blocks)](
            p,
            sum_g,
            conv_weight,
            bn,
            grad,
            mean,
            scatter,
            dw,
            *sizes,
            precision(conv_weight.dtype),
            *tile,
            num_warps=small.num_warps,
        )
        if scatter is None:
            return dw, grad, u, None, None, None, None
        _gram_bwd_square_kernel[(blocks, blocks)](
            conv_weight,
            bn,
            grad,
            mean,
            scatter,
            bounds,
            v,
            v_scale,
            partials,
            *units(n, k),
            programs,
            *unit(n, k),
            precision(conv_weight.dtype),
            *tile,
            num_warps=small.num_warps,
        )
        offset, d = torch.empty_like(mean), None if conv_weight.dtype == torch.float32 else torch.empty_like(mean)
        block = 128  # a value per thread
        _gram_bwd_offsets_kernel[(ceil_div(k, block),)](
            partials, mean, scatter, offset, d, programs + blocks, *units(k), *unit(k), 8, block, 3, num_warps=4
        )
    return dw, grad, u, v, offset, v_scale, d
