"""Spatial convolutions of any kernel size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import acc

Pair = tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """y = conv(x) `[N, Ho, Wo, K]`, rounded once to x's dtype; x `[N, H, W, C]`, weight `[K, C/groups, R, S]`."""
    y = F.conv2d(acc(x).permute(0, 3, 1, 2), acc(weight), None, stride, padding, dilation, groups)
    return y.permute(0, 2, 3, 1).to(x.dtype).contiguous()


def conv2d_dgrad(
    dy: Tensor,
    weight: Tensor,
    input_hw: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """dx `[N, H, W, C]` of `conv2d` from dy `[N, Ho, Wo, K]`; (H, W) = input_hw."""
    shape = (dy.shape[0], weight.shape[1] * groups, *input_hw)
    wide = acc(dy).permute(0, 3, 1, 2)
    dx = torch.nn.grad.conv2d_input(shape, acc(weight), wide, stride, padding, dilation, groups)
    return dx.permute(0, 2, 3, 1).to(dy.dtype).contiguous()


def conv2d_wgrad(
    x: Tensor,
    dy: Tensor,
    kernel_hw: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """dW `[K, C/groups, R, S]` in acc of `conv2d`; (R, S) = kernel_hw."""
    shape = (dy.shape[-1], x.shape[-1] // groups, *kernel_hw)
    wide_x, wide_dy = acc(x).permute(0, 3, 1, 2), acc(dy).permute(0, 3, 1, 2)
    return torch.nn.grad.conv2d_weight(wide_x, shape, wide_dy, stride, padding, dilation, groups)
