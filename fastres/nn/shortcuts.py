"""The shortcut of a residual block where its input and output differ: options A, B and C of the paper.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), sections 3.3 and 4.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .guard import block_conv_reason, child_reason, norm_reason

OPTIONS = ("A", "B", "C")


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and zeros for the channels that the block adds. No parameters.

    `[N, in_channels, H, W]` -> `[N, out_channels, ceil(H/stride), ceil(W/stride)]`; the zeros come after the input's
    channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels={out_channels} is less than in_channels={in_channels}, and a zero-padding shortcut "
                "only adds channels; use a projection"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.out_channels - self.in_channels))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def projection_shortcut(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Options B and C: a strided 1x1 conv and a norm, under torchvision's keys `0` and `1`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False), norm_layer(out_channels)
    )


def make_shortcut(
    option: str,
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Module | None:
    """The shortcut that `option` prescribes for a block, None for the identity.

    A: zero padding where dimensions change. B: a projection where they change. C: a projection everywhere. Raises
    ValueError for another option.
    """
    if option not in OPTIONS:
        raise ValueError(f"shortcut={option!r} is not known; use 'A' (zero padding), 'B' or 'C' (projections)")
    if option != "C" and stride == 1 and in_channels == out_channels:
        return None
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return projection_shortcut(in_channels, out_channels, stride, norm_layer)


def projection_reason(downsample: nn.Module, stride: int) -> str | None:
    """Why a block of this stride cannot take `downsample` into its fused forward, or None."""
    reason = child_reason("downsample", downsample, nn.Sequential)
    if reason is not None:
        return reason
    children = downsample.__dict__["_modules"]
    if len(children) != 2:
        return f"downsample has {len(children)} children, not a conv and a norm"
    conv, bn = children.values()
    return block_conv_reason("downsample[0]", conv, 1, stride=stride) or norm_reason("downsample[1]", bn)
