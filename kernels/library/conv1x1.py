"""1x1 convolutions as matrix products by the library's GEMM over rows of pixels.

But in float32 on a GPU as convolutions, like the stock layers: PyTorch lets cuDNN use TF32 and keeps it from GEMMs
(`torch.backends.cudnn.allow_tf32` and `torch.backends.cuda.matmul.allow_tf32`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._common import rows, strided_pixels
from ..reference.batch_norm import ChannelStats
from ..reference.conv2d import Pair
from ._common import activation, added, bn_input_grad, masked, matmul_acc, on_gpu
from .batch_norm import channel_stats
from .conv2d import conv2d, conv2d_dgrad, conv2d_wgrad


def _by_cudnn(x: Tensor) -> bool:
    return on_gpu(x) and x.dtype == torch.float32


def conv1x1(
    x: Tensor, weight: Tensor, stride: int = 1, with_stats: bool = True, bn: Tensor | None = None
) -> tuple[Tensor, ChannelStats | None]:
    """As the reference; relu(scale*x + shift) is written and read once."""
    if bn is not None:
        x = activation(strided_pixels(x, stride), bn)
        stride = 1
    if _by_cudnn(x):
        y = conv2d(x, weight[:, :, None, None], (stride, stride))
    else:
        x = strided_pixels(x, stride)
        y = (rows(x) @ weight.T).view(*x.shape[:3], -1)
    return y, channel_stats(y) if with_stats else None


def _raw_grad(g: Tensor, y: Tensor | None, bn: Tensor | None, grad: Tensor | None) -> Tensor:
    """dy, written and read once where it is formed from a batch norm's vectors."""
    return g if bn is None else bn_input_grad(g, y, bn, grad)


def conv1x1_dgrad(
    g: Tensor,
    weight: Tensor,
    input_hw: Pair,
    stride: int = 1,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    keep_residual: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """As the reference; adds to the residual in place where it may."""
    dx = _dgrad(_raw_grad(g, y, bn, grad), weight, input_hw, stride, residual, keep_residual)
    return dx if mask is None else masked(dx, mask)


def _dgrad(
    dy: Tensor, weight: Tensor, input_hw: Pair, stride: int, residual: Tensor | None, keep_residual: bool
) -> Tensor:
    if _by_cudnn(dy):
        return added(conv2d_dgrad(dy, weight[:, :, None, None], input_hw, (stride, stride)), residual)
    shape = (dy.shape[0], *input_hw, weight.shape[1])
    if stride == 1:
        if residual is None:
            dx = rows(dy) @ weight
        elif keep_residual:
            dx = rows(residual).addmm(rows(dy), weight)
        else:
            dx = rows(residual).addmm_(rows(dy), weight)
        return dx.view(shape)
    dx = dy.new_zeros(shape) if residual is None else residual.clone() if keep_residual else residual
    pixels = strided_pixels(dx, stride)
    pixels.add_((rows(dy) @ weight).view(pixels.shape))
    return dx


def conv1x1_wgrad(
    x: Tensor,
    g: Tensor,
    stride: int = 1,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """As the reference."""
    return _wgrad(x, _raw_grad(g, y, bn, grad), stride)


def _wgrad(x: Tensor, dy: Tensor, stride: int) -> Tensor:
    if _by_cudnn(dy):
        return conv2d_wgrad(x, dy, (1, 1), (stride, stride)).flatten(1)
    return matmul_acc(rows(dy).T, rows(strided_pixels(x, stride)))


def conv1x1_bwd(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    keep_residual: bool = False,
    mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the reference, dy formed once; adds to the residual in place where it may."""
    dy = _raw_grad(g, y, bn, grad)
    dw = _wgrad(x, dy, 1)
    dx = _dgrad(dy, weight, x.shape[1:3], 1, residual, keep_residual)
    return masked(dx, x) if mask else dx, dw
