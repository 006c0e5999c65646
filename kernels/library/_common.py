"""Building blocks of the library kernels: single ATen operators that are fast on channels_last memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._common import acc, acc_dtype


def on_gpu(t: Tensor) -> bool:
    """Whether `t` is on a GPU, or on the meta device, which stands for one where bytes are counted."""
    return t.device.type != "cpu"


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


def added(dx: Tensor, residual: Tensor | None) -> Tensor:
    """dx, which may change, with the residual, which may not."""
    return dx if residual is None else dx.add_(residual)


def bn_sums(g: Tensor, y: Tensor, bn: Tensor) -> Tensor:
    """sum g and sum g*(y - mean), `[1, 2, C]` in acc, in one read of both."""
    if on_gpu(g):
        reduce = torch.batch_norm_backward_reduce
        sum_g, centred, _, _ = reduce(nchw(g), nchw(y), bn[0], bn[1], None, True, False, False)
    else:
        # With rstd 1, the gradient of a batch norm's gamma is the centred sum itself.
        one = torch.ones_like(bn[0])
        backward = torch.ops.aten.native_batch_norm_backward
        outputs = [False, True, True]
        _, centred, sum_g = backward(nchw(g), nchw(y), one, None, None, bn[0], one, True, 0.0, outputs)
    return torch.stack([sum_g, centred]).unsqueeze(0)


def bn_input_grad(g: Tensor, y: Tensor | None, bn: Tensor, grad: Tensor | None) -> Tensor:
    """dy = scale*(g + b*y + c) in g's dtype; without y or grad (constant statistics) scale*g."""
    scale = bn[2]
    if y is None or grad is None:
        return affine(g, scale, torch.zeros_like(scale))
    dy = affine(y, scale * grad[2], scale * grad[3])
    if g.dtype == scale.dtype:
        return dy.addcmul_(g, scale)
    return dy.add_(affine(g, scale, torch.zeros_like(scale)))


def matmul_acc(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, summed and returned in acc."""
    if a.dtype == acc_dtype(a.dtype):
        return a @ b
    if on_gpu(a):
        return torch.mm(a, b, out_dtype=acc_dtype(a.dtype))
    return acc(a) @ acc(b)
