"""The residual blocks' 3x3 convolutions: the library's, with BN + ReLU, masks and sums as passes around them."""

from __future__ import annotations

from torch import Tensor

from ..reference.batch_norm import ChannelStats
from ..reference.conv2d import Pair
from ._common import activation, affine, bn_sums, masked
from .batch_norm import channel_stats
from .conv2d import conv2d, conv2d_dgrad, conv2d_wgrad


def conv3x3(
    x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1, groups: int = 1, with_stats: bool = True
) -> tuple[Tensor, ChannelStats | None]:
    """As the reference."""
    y = conv2d(x, weight, (stride, stride), (dilation, dilation), (dilation, dilation), groups)
    return y, channel_stats(y) if with_stats else None


def conv3x3_dgrad(
    dy: Tensor,
    weight: Tensor,
    input_hw: Pair,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    *,
    y: Tensor | None = None,
    bn: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As the reference."""
    square = (stride, stride), (dilation, dilation), (dilation, dilation)
    dx = conv2d_dgrad(dy, weight, input_hw, *square, groups)
    if bn is None:
        return dx if residual is None else residual.add_(dx), None
    g = masked(dx, affine(y, bn[2], bn[3]))
    return g, bn_sums(g, y, bn)


def conv3x3_wgrad(
    x: Tensor, dy: Tensor, stride: int = 1, dilation: int = 1, groups: int = 1, bn: Tensor | None = None
) -> Tensor:
    """As the reference."""
    square = (stride, stride), (dilation, dilation), (dilation, dilation)
    return conv2d_wgrad(x if bn is None else activation(x, bn), dy, (3, 3), *square, groups)
