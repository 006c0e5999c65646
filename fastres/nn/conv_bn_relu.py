"""Convolution, batch norm and ReLU: the unit of plain networks, and the first layer of ResNets for small images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastres import functional

from .fused import FusedUnit
from .guard import batch_norm_params, child_reason, conv_reason, conv_weight, norm_reason


class StockConvBNReLU2d(nn.Module):
    """`ConvBNReLU2d` with its children run one by one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class FusedConvBNReLU2d(FusedUnit):
    """Runs the children `conv`, `bn` and `relu` through `fastres.functional.conv_bn_relu`."""

    unit = "conv_bn_relu"

    def fused_reason(self) -> str | None:
        get = self.__dict__["_modules"].get
        return (
            conv_reason("conv", get("conv"))
            or norm_reason("bn", get("bn"))
            or child_reason("relu", get("relu"), nn.ReLU)
        )

    def fused_forward(self, x: Tensor) -> Tensor:
        modules = self.__dict__["_modules"]
        conv = modules["conv"].__dict__
        return functional.conv_bn_relu(
            x,
            conv_weight(modules["conv"]),
            batch_norm_params(modules["bn"]),
            stride=conv["stride"],
            padding=conv["padding"],
            dilation=conv["dilation"],
            groups=conv["groups"],
            backend=self.backend,
        )


class ConvBNReLU2d(FusedConvBNReLU2d, StockConvBNReLU2d):
    """relu(BN(conv(x))), fused. state_dict keys: `conv.weight` and `bn.*`.

    `[N, in_channels, H, W]` -> `[N, out_channels, ceil(H/stride), ceil(W/stride)]` for an odd `kernel_size`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: of the conv, which has no bias and is padded
            with `dilation*(kernel_size - 1)//2` zeros.
        norm_layer: makes a norm from a number of channels; with others than nn.BatchNorm2d the children run one by one.

    The attribute `backend` chooses the kernels, see `fastres.backends.CHOICES`.
    """

    stock_class = StockConvBNReLU2d
