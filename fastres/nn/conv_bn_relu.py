"""Convolution, batch norm and ReLU: the unit of plain networks, and the first layer of ResNets for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastres import functional

from .fused import FusedUnit
from .guard import batch_norm_params, child_reason, conv_bias, conv_reason, conv_weight, norm_reason


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
        return layers_reason(self, ("conv", "bn", "relu"))

    def fused_forward(self, x: Tensor) -> Tensor:
        modules = self.__dict__["_modules"]
        return run_layers(modules["conv"], modules["bn"], x, self.backend)


def layers_reason(module: nn.Module, names: Sequence[str]) -> str | None:
    """Why the children of these names cannot run as one convolution with batch norm and ReLU, or None."""
    get = module.__dict__["_modules"].get
    conv, bn, relu = names
    return (
        conv_reason(conv, get(conv), may_have_bias=True)
        or norm_reason(bn, get(bn))
        or child_reason(relu, get(relu), nn.ReLU)
    )


def run_layers(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, backend: str) -> Tensor:
    """relu(bn(conv(x))), fused."""
    state = conv.__dict__
    return functional.conv_bn_relu(
        x,
        conv_weight(conv),
        batch_norm_params(bn),
        conv_bias=conv_bias(conv),
        stride=state["stride"],
        padding=state["padding"],
        dilation=state["dilation"],
        groups=state["groups"],
        backend=backend,
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
