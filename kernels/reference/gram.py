"""Gram folding: the statistics of a 1x1 conv's output, and its backward, from a small matrix of its input.

For y = a W^T the batch statistics of y follow from the mean of a and its scatter S = sum (a - mean)(a - mean)^T:
mean_y = W mean_a and var_y = diag(W S W^T)/M. Scale and shift are so known before the conv runs, and y never has to be
written. docs/arithmetic.md derives both directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import acc, activation, rows, scaled, scaled_to_float16, small_product
from .batch_norm import scale_and_shift, stack_grad, update_running_stats

PIVOT_ROWS = 64


class Gram(NamedTuple):
    """Second moments of M rows a about a pivot: gram `[K, K]` = sum (a-p)(a-p)^T, total `[K]` = sum (a-p), pivot `[K]`.

    All in acc. The pivot, the mean of the first rows, keeps float32 exact enough where |mean| is far above the standard
    deviation; no later float64 could bring back what an unpivoted sum has lost.
    """

    gram: Tensor
    total: Tensor
    pivot: Tensor


def gram_of_rows(a: Tensor) -> Gram:
    """The second moments of a `[M, K]`."""
    a = acc(a)
    # An empty batch has no rows to take a mean of.
    pivot = a[:PIVOT_ROWS].sum(0) / max(1, min(PIVOT_ROWS, a.shape[0]))
    centred = a - pivot
    return Gram(centred.T @ centred, centred.sum(0), pivot)


def gram(y: Tensor, bn: Tensor) -> Gram:
    """The second moments of a = relu(scale*y + shift), y `[N, H, W, K]`, a rounded to y's dtype as a GEMM reads it."""
    return gram_of_rows(rows(activation(y, bn)))


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
    """Batch norm of y = a W^T from the moments of a; updates the running statistics as `bn_finalize` does.

    count: M. conv_weight: W `[N, K]`, the rounded weights that the GEMM will use. weight, bias and the rest: as in
    `bn_finalize`, `[N]`.

    Returns `(bn, mean, scatter)`: `bn` `[4, N]`, the mean of a `[K]`, and S `[K, K]`, all in acc.
    """
    offset = moments.total / count
    mean = moments.pivot + offset
    scatter = moments.gram - torch.outer(moments.total, offset)
    w = acc(conv_weight)
    # Rounding can push the variance of a constant channel below zero.
    m2 = (small_product(w, scatter) * w).sum(1).clamp_(min=0)
    mean_y = w @ mean
    update_running_stats(mean_y, m2, count, running_mean, running_var, num_batches_tracked, momentum)
    return scale_and_shift(mean_y, m2 / count, weight, bias, eps), mean, scatter


def gram_bwd(
    p: Tensor,
    sum_g: Tensor,
    conv_weight: Tensor,
    bn: Tensor,
    count: int,
    mean: Tensor | None = None,
    scatter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The small-matrix half of the backward of BN(a W^T).

    p `[N, K]` = g^T a and sum_g `[N]` in acc, where g is the gradient of the BN's output; conv_weight W `[N, K]`;
    mean, scatter as from `gram_finalize`, both None for constant statistics.

    Returns `(dW, grad, u, v, k, v_scale, d)`: dW `[N, K]` and `grad` `[4, N]` in acc, and the operands of the gradient
    of a, da = g u + v_scale*(a v) + d*a + k: u `[N, K]` and v `[K, K]` in W's dtype, k and d `[K]` in acc. In float16
    v, of the order of dgamma/M, would underflow: there it is multiplied by a power of two, and v_scale, float32 `[]`,
    undoes that; otherwise v_scale is None, and 1. k and d make good what rounding u and v would add up to over the
    pixels: with k the mean of da is zero to acc's rounding, with d sum da*a is what it is without rounding. Where W's
    dtype is acc's own, d is None. For constant statistics v, k and d are.
    """
    w = acc(conv_weight)
    mean_y, rstd, scale = bn[0], bn[1], bn[2]
    u = (scale[:, None] * w).to(conv_weight.dtype)
    if scatter is None:
        dgamma = rstd * ((p * w).sum(1) - mean_y * sum_g)
        return scale[:, None] * p, stack_grad(dgamma, sum_g, mean_y, rstd, None), u, None, None, None, None
    centred = p - torch.outer(sum_g, mean)
    dgamma = rstd * (centred * w).sum(1)
    grad = stack_grad(dgamma, sum_g, mean_y, rstd, count)
    slope = grad[2][:, None]
    dw = scale[:, None] * (centred + slope * small_product(w, scatter))
    exact = small_product(w.T, scale[:, None] * slope * w)
    v, v_scale = scaled_to_float16(exact) if u.dtype == torch.float16 else (exact.to(u.dtype), None)
    # Matrix times vector: the other way round is a product of matrices, which might be TF32's.
    k = -(acc(u).T @ (sum_g / count) + scaled(acc(v).T @ mean, v_scale))
    if u.dtype == w.dtype:
        return dw, grad, u, v, k, v_scale, None
    lost = (scale[:, None] * w - acc(u)) * centred, (exact - scaled(acc(v), v_scale)) * scatter
    variances = scatter.diagonal()
    d = (lost[0].sum(0) + lost[1].sum(0)) / variances
    d.masked_fill_(variances <= 0, 0)
    return dw, grad, u, v, k - d * mean, v_scale, d
