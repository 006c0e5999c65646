"""Convolutions of images, whose few channels are padded with zeros: tensor cores take several at a time.

`channels` is how many there are then. Whether that is faster than to leave it to cuDNN is for a measurement to say
(`fastres.plan`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..reference.conv2d import Pair
from . import conv2d as _conv2d
from . import conv2d_wgrad as _conv2d_wgrad


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    *,
    channels: int,
) -> Tensor:
    """As the reference, for groups = 1."""
    weight = F.pad(weight.permute(0, 2, 3, 1), (0, channels - weight.shape[1])).permute(0, 3, 1, 2)
    return _conv2d(F.pad(x, (0, channels - x.shape[-1])), weight, stride, padding, dilation, groups)


def conv2d_wgrad(
    x: Tensor,
    dy: Tensor,
    kernel_hw: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    *,
    channels: int,
) -> Tensor:
    """As the reference, for groups = 1."""
    x, own = F.pad(x, (0, channels - x.shape[-1])), x.shape[-1]
    return _conv2d_wgrad(x, dy, kernel_hw, stride, padding, dilation, groups)[:, :own]
