"""Spatial convolutions by cuDNN or oneDNN in the activation dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference._common import acc
from ..reference.conv2d import Pair
from ._common import nchw, nhwc


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """As the reference."""
    return nhwc(F.conv2d(nchw(x), weight, None, stride, padding, dilation, groups))


def conv2d_dgrad(
    dy: Tensor,
    weight: Tensor,
    input_hw: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """As the reference."""
    # torch.nn.grad.conv2d_input has a placeholder for x that makes cuDNN leave channels_last, with copies to and fro.
    x = nchw(dy.new_empty(dy.shape[0], *input_hw, weight.shape[1] * groups))
    backward = torch.ops.aten.convolution_backward
    wanted = [True, False, False]
    dx, _, _ = backward(nchw(dy), x, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted)
    return nhwc(dx)


def conv2d_wgrad(
    x: Tensor,
    dy: Tensor,
    kernel_hw: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """As the reference, but rounded to the activation dtype on the way, as the library returns it."""
    shape = (dy.shape[-1], x.shape[-1] // groups, *kernel_hw)
    x, dy = nchw(x), nchw(dy)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and dilation != (1, 1):
        # oneDNN returns NaN for dilated bfloat16 wgrads in channels_last memory unless channels are multiples of 16.
        x, dy = x.contiguous(), dy.contiguous()
    return acc(torch.nn.grad.conv2d_weight(x, shape, dy, stride, padding, dilation, groups))
