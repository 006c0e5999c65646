"""The residual blocks' 3x3 convolutions: the library's, with BN + ReLU, masks and sums as passes around them.

Each function takes the namespace of those passes (`channel_stats`, `bn_act`, `bn_bwd_mask`, `add_masked`) as a keyword
besides: a plan may have a library's convolution with Triton's passes.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

from torch import Tensor

from ..reference.batch_norm import ChannelStats
from ..reference.conv2d import Pair
from . import batch_norm
from ._common import added, masked
from .conv2d import conv2d, conv2d_dgrad, conv2d_wgrad

Passes = ModuleType | SimpleNamespace


def conv3x3(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    with_stats: bool = True,
    *,
    passes: Passes = batch_norm,
) -> tuple[Tensor, ChannelStats | None]:
    """As the reference."""
    y = conv2d(x, weight, (stride, stride), (dilation, dilation), (dilation, dilation), groups)
    return y, passes.channel_stats(y) if with_stats else None


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
    mask: Tensor | None = None,
    passes: Passes = batch_norm,
) -> tuple[Tensor, Tensor | None]:
    """As the reference."""
    square = (stride, stride), (dilation, dilation), (dilation, dilation)
    dx = conv2d_dgrad(dy, weight, input_hw, *square, groups)
    if bn is not None:
        return passes.bn_bwd_mask(dx, y, bn)
    if residual is not None and mask is not None:
        return passes.add_masked(dx, residual, mask), None
    dx = added(dx, residual)
    return dx if mask is None else masked(dx, mask), None


def conv3x3_wgrad(
    x: Tensor,
    dy: Tensor,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bn: Tensor | None = None,
    *,
    passes: Passes = batch_norm,
) -> Tensor:
    """As the reference."""
    square = (stride, stride), (dilation, dilation), (dilation, dilation)
    return conv2d_wgrad(x if bn is None else passes.bn_act(x, bn), dy, (3, 3), *square, groups)
