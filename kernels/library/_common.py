"""Building blocks of the library kernels: single ATen operators that are fast on channels_last memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._common import acc, acc_dtype, rows


def nchw(t: Tensor) -> Tensor:
    """Dense `[N, H, W, C]` as channels_last `[N, C, H, W]`, a view; ATen's operators read it without a copy."""
    return t.permute(0, 3, 1, 2)


def nhwc(t: Tensor) -> Tensor:
    """`[N, C, H, W]` as dense `[N, H, W, C]`; a view of channels_last memory."""
    return t.permute(0, 2, 3, 1).contiguous()


def affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale*y + shift per channel in one pass over y `[N, H, W, C]`, rounded once to y's dtype.

    Batch norm in eval mode with mean 0, variance 1 and eps 0 is ATen's only fused multiply-add that takes float32
    vectors beside bfloat16 activations.
    """
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return nhwc(torch.batch_norm(nchw(y), scale, shift, zero, one, False, 0.0, 0.0, False))


def activation(y: Tensor, bn: Tensor) -> Tensor:
    """relu(scale*y + shift) in y's dtype."""
    return affine(y, bn[2], bn[3]).relu_()


def masked(g: Tensor, z: Tensor) -> Tensor:
    """`g` where ~(z <= 0), in one pass."""
    return torch.ops.aten.threshold_backward(g, z, 0)


def _native_backward(g: Tensor, y: Tensor, gamma: Tensor, bn: Tensor, outputs: list[bool]) -> tuple:
    """ATen's CPU batch norm backward: gradients of the input, gamma and beta as `outputs` asks."""
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(nchw(g), nchw(y), gamma, None, None, bn[0], bn[1], True, 0.0, outputs)


def bn_sums(g: Tensor, y: Tensor, bn: Tensor) -> Tensor:
    """sum g and sum g*(y - mean), `[1, 2, C]` in acc, in one read of both."""
    if g.is_cuda:
        reduce = torch.batch_norm_backward_reduce
        sum_g, centred, _, _ = reduce(nchw(g), nchw(y), bn[0], bn[1], None, True, False, False)
    else:
        _, dgamma, sum_g = _native_backward(g, y, torch.ones_like(bn[0]), bn, [False, True, True])
        centred = dgamma / bn[1]
    return torch.stack([sum_g, centred]).unsqueeze(0)


def bn_input_grad(g: Tensor, y: Tensor | None, bn: Tensor, grad: Tensor) -> Tensor:
    """dy = scale*(g + b*y + c) in one pass, rounded once to g's dtype; without y (constant statistics) scale*g."""
    if y is None:
        return affine(g, bn[2], torch.zeros_like(bn[2]))
    gamma = bn[2] / bn[1]
    if g.is_cuda:
        count = torch.full((1,), rows(g).shape[0], dtype=torch.int32, device=g.device)
        sums = grad[1], grad[0] / bn[1]
        dy = torch.batch_norm_backward_elemt(nchw(g), nchw(y), bn[0], bn[1], gamma, *sums, count)
    else:
        dy, _, _ = _native_backward(g, y, gamma, bn, [True, False, False])
    return nhwc(dy)


def matmul_acc(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, summed and returned in acc."""
    if a.dtype == acc_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=acc_dtype(a.dtype))
    return acc(a) @ acc(b)
