"""Batch norm: statistics, scale and shift, application with residual add and ReLU, and the backward pass.

Source: Ioffe & Szegedy, "Batch Normalization" (2015), algorithm 1, and He et al., "Deep Residual Learning" (2015),
section 3.2 for the residual add + ReLU. docs/arithmetic.md derives the backward forms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import acc, acc_dtype, bn_input_grad, centred_sums, masked, rows


class ChannelStats(NamedTuple):
    """Welford partials of P groups of rows. The groups may differ in size.

    count: `[P]` rows in each group. mean: `[P, C]`. m2: `[P, C]` sum of squared deviations from the group's mean.
    All in acc.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor


def channel_stats(y: Tensor) -> ChannelStats:
    """Statistics of every channel of y `[N, H, W, C]`, in one read."""
    y = rows(acc(y))
    var, mean = torch.var_mean(y, 0, correction=0)
    return ChannelStats(y.new_full((1,), y.shape[0]), mean.unsqueeze(0), (var * y.shape[0]).unsqueeze(0))


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
    """Combine the partials in their order (Chan et al.), form `bn`, update the running statistics in place.

    weight, bias: gamma and beta `[C]`, None for 1 and 0. running_mean, running_var `[C]` and num_batches_tracked `[]`
    (int64) are updated as `torch.nn.BatchNorm2d` does: with the unbiased variance, by `momentum`, or by
    1/num_batches_tracked when momentum is None; None leaves them alone. No value is read by the host.

    Returns `bn` `[4, C]` in acc.
    """
    count, mean, m2 = stats.count[0], stats.mean[0], stats.m2[0]
    for group in range(1, stats.count.shape[0]):
        total = count + stats.count[group]
        delta = stats.mean[group] - mean
        mean = mean + delta * (stats.count[group] / total)
        m2 = m2 + stats.m2[group] + delta.square() * (count * stats.count[group] / total)
        count = total
    update_running_stats(mean, m2, count, running_mean, running_var, num_batches_tracked, momentum)
    return scale_and_shift(mean, m2 / count, weight, bias, eps)


def update_running_stats(
    mean: Tensor,
    m2: Tensor,
    count: Tensor | int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Move the running statistics towards this batch's, in place; see `bn_finalize`."""
    if running_mean is None:
        return
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    # 1/num_batches_tracked must not pass through float32: its rounding shows after three steps.
    factor = num_batches_tracked.double().reciprocal() if momentum is None else momentum
    for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
        # As a sum of shares: a step added to the old value would lose the digits of a batch far smaller than that.
        running.copy_((1 - factor) * acc(running) + factor * batch)


def bn_constants(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """`bn` `[4, C]` for constant statistics (eval mode, frozen BN), in the accumulation dtype of `dtype`."""
    wide = acc_dtype(dtype)
    return scale_and_shift(running_mean.to(wide), running_var.to(wide), weight, bias, eps)


def scale_and_shift(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Stack mean, rstd, scale, shift into `bn`, `[4, C]` in the dtype of `mean`."""
    rstd = (var + eps).rsqrt()
    scale = rstd if weight is None else weight.to(rstd.dtype) * rstd
    shift = -mean * scale if bias is None else bias.to(rstd.dtype) - mean * scale
    return torch.stack([mean, rstd, scale, shift])


def bn_act(
    y: Tensor, bn: Tensor, residual: Tensor | None = None, residual_bn: Tensor | None = None, relu: bool = True
) -> Tensor:
    """out = relu(scale*y + shift + shortcut), rounded once to y's dtype.

    y `[N, H, W, C]`; shortcut: nothing, `residual` `[N, H, W, C]` itself, or, with `residual_bn` `[4, C]`, the
    projected shortcut residual_scale*residual + residual_shift. `relu=False` leaves the ReLU out.
    """
    z = acc(y) * bn[2] + bn[3]
    if residual is not None:
        z += acc(residual) if residual_bn is None else acc(residual) * residual_bn[2] + residual_bn[3]
    return (z.relu_() if relu else z).to(y.dtype)


def _relu_masked(g: Tensor, y: Tensor | None, bn: Tensor, out: Tensor | None, relu: bool) -> Tensor:
    if out is not None:
        return masked(g, out)
    return masked(g, acc(y) * bn[2] + bn[3]) if relu else g


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
    """Partial sums of g' and g'*(y - mean) for one BN, or in the same read for two.

    g `[N, H, W, C]` is the gradient of the ReLU's output and g' what the ReLU lets through: by `out` (its output) when
    given, else with `relu=True` by the sign of scale*y + shift, else g' = g. `residual` and `residual_bn` are the raw
    input and the vectors of a projected shortcut's BN, which shares g'.

    Returns `(sums, residual_sums)`, each `[P, 2, C]` in acc (rows sum g', sum g'*(y - mean)); the second is None
    without a projected shortcut.
    """
    g = _relu_masked(g, y, bn, out, relu)
    return centred_sums(g, y, bn), None if residual_bn is None else centred_sums(g, residual, residual_bn)


def bn_bwd_mask(g: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """g' = g masked by the sign of scale*y + shift, and in the same read the sums `[P, 2, C]` of `bn_bwd_reduce`.

    g, y `[N, H, W, C]`; g' may take g's memory.
    """
    g = _relu_masked(g, y, bn, None, True)
    return g, centred_sums(g, y, bn)


def bn_bwd_finalize(sums: Tensor, bn: Tensor, count: int | None) -> Tensor:
    """Sum the partials `[P, 2, C]` in their order and form `grad` `[4, C]`: dgamma, dbeta, b, c.

    count: rows over which the statistics were taken, or None for constant statistics (then b = c = 0).
    """
    dbeta, centred = sums.sum(0)
    mean, rstd = bn[0], bn[1]
    dgamma = rstd * centred
    return stack_grad(dgamma, dbeta, mean, rstd, count)


def stack_grad(dgamma: Tensor, dbeta: Tensor, mean: Tensor, rstd: Tensor, count: int | None) -> Tensor:
    """`grad` from dgamma and dbeta: b = -rstd*dgamma/M, c = (mean*rstd*dgamma - dbeta)/M."""
    if count is None:
        zero = torch.zeros_like(dbeta)
        return torch.stack([dgamma, dbeta, zero, zero])
    slope = rstd * dgamma
    return torch.stack([dgamma, dbeta, -slope / count, (mean * slope - dbeta) / count])


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
    """dy = scale*(g' + b*y + c), and in the same pass the shortcut's gradient.

    g, out, relu and g' as in `bn_bwd_reduce`. With constant statistics b = c = 0: `grad` may be None, and `y` where the
    mask does not need it. The second result is None unless `need_residual`; then it is g' (identity shortcut) or, with
    `residual`, `residual_bn` and `residual_grad` (a projected shortcut's raw input and vectors; the first and the last
    may be None for constant statistics), residual_scale*(g' + residual_b*residual + residual_c).

    Returns `(dy, dresidual)`, each `[N, H, W, C]` in g's dtype.
    """
    g = _relu_masked(g, y, bn, out, relu)
    dy = bn_input_grad(g, y, bn, grad).to(g.dtype)
    if not need_residual:
        return dy, None
    if residual_bn is None:
        return dy, g
    return dy, bn_input_grad(g, residual, residual_bn, residual_grad).to(g.dtype)


def add_masked(g: Tensor, residual: Tensor, out: Tensor) -> Tensor:
    """g + residual, masked by the ReLU whose output `out` is: the gradient where a shortcut leaves a block's input.

    All `[N, H, W, C]`, as the result, rounded once to g's dtype; it may take g's memory.
    """
    return masked(acc(g) + acc(residual), out).to(g.dtype)
