"""The 3x3 convolutions of a residual block (padding = dilation) and the passes that touch the same tiles.

The BN + ReLU before the conv is formed on load in `conv3x3_wgrad`; the mask and the two sums that the same BN's
backward needs come out of `conv3x3_dgrad`.
"""

from __future__ import annotations

from torch import Tensor

from ._common import acc, activation, centred_sums, masked
from .batch_norm import ChannelStats, channel_stats
from .conv2d import Pair, conv2d, conv2d_dgrad, conv2d_wgrad


def in_boxes(stride: int, dilation: int, groups: int) -> bool:
    """Whether Triton has a convolution, whose taps are boxes of pixels; it leaves others to the library."""
    return groups == 1 and (stride == 1 or (stride == 2 and dilation == 1))


def conv3x3(
    x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1, groups: int = 1, with_stats: bool = True
) -> tuple[Tensor, ChannelStats | None]:
    """y `[N, Ho, Wo, K]` = conv(x) and its statistics (None without `with_stats`); x `[N, H, W, C]`."""
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
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx `[N, H, W, C]` from dy `[N, Ho, Wo, K]`, in one of two forms.

    With `y` `[N, H, W, C]` and `bn`: the conv's input was relu(scale*y + shift), so dx is masked by that ReLU and comes
    with the sums `[P, 2, C]` of `bn_bwd_reduce`. Without: dx, plus `residual` `[N, H, W, C]` where given, and None;
    with `mask` `[N, H, W, C]`, the conv's input and a ReLU's output, masked by it for a block in front that expects so.
    """
    square = (stride, stride), (dilation, dilation), (dilation, dilation)
    dx = conv2d_dgrad(dy, weight, input_hw, *square, groups)
    if bn is None:
        if residual is not None:
            dx = (acc(dx) + acc(residual)).to(dx.dtype)
        return dx if mask is None else masked(dx, mask), None
    g = masked(dx, acc(y) * bn[2] + bn[3])
    return g, centred_sums(g, y, bn)


def conv3x3_wgrad(
    x: Tensor, dy: Tensor, stride: int = 1, dilation: int = 1, groups: int = 1, bn: Tensor | None = None
) -> Tensor:
    """dW `[K, C/groups, 3, 3]` in acc. With `bn`, x is the raw y and the conv's input is relu(scale*y + shift)."""
    square = (stride, stride), (dilation, dilation), (dilation, dilation)
    return conv2d_wgrad(activation(x, bn), dy, (3, 3), *square, groups)
