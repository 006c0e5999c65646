"""Batch norm by ATen's statistics, element-wise and reduction kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._common import acc_dtype, rows
from ..reference.batch_norm import ChannelStats
from ._common import affine, bn_input_grad, bn_sums, masked, nchw, on_gpu


def channel_stats(y: Tensor) -> ChannelStats:
    """As the reference, in one read of y and without a float32 copy of it."""
    count = rows(y).shape[0]
    if on_gpu(y):
        # Not batch_norm_stats, which gives 1/sqrt(variance): of a constant channel 0, as of an infinite variance.
        mean, var = torch.ops.aten.batch_norm_update_stats(nchw(y), None, None, 0.0)
    else:
        # ATen's mean over channels_last memory is a plain running sum; the variance around it is good, the mean is not.
        mean = y.sum((0, 1, 2), dtype=acc_dtype(y.dtype)) / count
        # The dummy running statistics make it return float32 for bfloat16 activations.
        dummy = torch.zeros_like(mean)
        _, var = torch.ops.aten.batch_norm_update_stats(nchw(y), dummy, dummy.clone(), 0.0)
    return ChannelStats(mean.new_full((1,), count), mean.unsqueeze(0), (var * count).unsqueeze(0))


def bn_act(
    y: Tensor, bn: Tensor, residual: Tensor | None = None, residual_bn: Tensor | None = None, relu: bool = True
) -> Tensor:
    """As the reference, in a pass for each operand and one for the ReLU."""
    z = affine(y, bn[2], bn[3])
    if residual is not None:
        z.add_(residual if residual_bn is None else affine(residual, residual_bn[2], residual_bn[3]))
    return z.relu_() if relu else z


def _relu_masked(g: Tensor, y: Tensor | None, bn: Tensor, out: Tensor | None, relu: bool) -> Tensor:
    if out is not None:
        return masked(g, out)
    return masked(g, affine(y, bn[2], bn[3])) if relu else g


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
    """As the reference."""
    g = _relu_masked(g, y, bn, out, relu)
    return bn_sums(g, y, bn), None if residual_bn is None else bn_sums(g, residual, residual_bn)


def bn_bwd_mask(g: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    g = _relu_masked(g, y, bn, None, True)
    return g, bn_sums(g, y, bn)


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
    """As the reference."""
    g = _relu_masked(g, y, bn, out, relu)
    dy = bn_input_grad(g, y, bn, grad)
    if not need_residual:
        return dy, None
    return dy, g if residual_bn is None else bn_input_grad(g, residual, residual_bn, residual_grad)


def add_masked(g: Tensor, residual: Tensor, out: Tensor) -> Tensor:
    """As the reference."""
    return masked(g.add_(residual), out)
