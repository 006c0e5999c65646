"""The residual blocks of ResNets, with torchvision's names, arguments and state_dict keys.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), figure 5; groups and base_width: Xie et al.,
"Aggregated Residual Transformations for Deep Neural Networks" (2017), and Zagoruyko and Komodakis, "Wide Residual
Networks" (2016).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastres import functional, plan

from .fused import FusedUnit
from .guard import batch_norm_params, block_conv_reason, child_reason, conv_weight, norm_reason
from .shortcuts import projection_reason


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


class StockBasicBlock(nn.Module):
    """Two 3x3 convs with batch norm and a shortcut, its children run one by one. See `BasicBlock`."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError("BasicBlock has groups=1, base_width=64 and dilation=1 only; use Bottleneck for others")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = _conv3x3(in_channels, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class StockBottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 conv with batch norm and a shortcut, its children run one by one. See `Bottleneck`."""

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        stride_on_1x1: bool = False,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        first, second = (stride, 1) if stride_on_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, second, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class FusedBlock(FusedUnit):
    """What the two blocks share: strides read from the convs, and the shortcut."""

    params: ClassVar[type]
    """What `functional.stage` takes for such a block."""

    def fused_stride(self) -> int:
        """The block's stride, of its first conv or of its second."""
        modules = self.__dict__["_modules"]
        return modules["conv1"].__dict__["stride"][0] * modules["conv2"].__dict__["stride"][0]

    def separate_reason(self) -> str | None:
        return None if self.downsample is None else projection_reason(self.downsample, self.fused_stride())

    def form(self, dtype: torch.dtype, device: torch.device) -> str:
        projection = None
        if self.downsample is not None and self.separate_reason() is None:
            conv = self.downsample[0]
            projection = conv.in_channels, conv.out_channels
        last = getattr(self, "conv3", None)
        last = last and (last.in_channels, last.out_channels)
        return plan.form_of_block(dtype, device, self.backend, self.conv1.out_channels, last, projection)

    def fused_arguments(self) -> dict:
        """Keyword arguments of the fused function, and of `params`: all but the shortcut."""
        raise NotImplementedError

    def fused_shortcut(self, x: Tensor) -> dict:
        """`projection` or `shortcut` for the fused function; neither is the identity."""
        downsample = self.downsample
        if downsample is None:
            return {}
        if projection_reason(downsample, self.fused_stride()) is not None:
            return {"shortcut": downsample(x)}
        return {"projection": _projection(downsample)}

    def fused_params(self) -> functional.BasicBlockParams | functional.BottleneckParams:
        """The block for `functional.stage`, which no shortcut that runs as its own module can be part of."""
        downsample = self.downsample
        return self.params(**self.fused_arguments(), projection=None if downsample is None else _projection(downsample))


def _projection(downsample: nn.Sequential) -> tuple[Tensor, functional.BatchNormParams]:
    conv, bn = downsample.__dict__["_modules"].values()
    return conv_weight(conv), batch_norm_params(bn)


class FusedBasicBlock(FusedBlock):
    """Runs a block with the children of `StockBasicBlock` through `fastres.functional.basic_block`."""

    unit = "basic_block"
    params = functional.BasicBlockParams

    def fused_reason(self) -> str | None:
        get = self.__dict__["_modules"].get
        return (
            block_conv_reason("conv1", get("conv1"), 3)
            or norm_reason("bn1", get("bn1"))
            or child_reason("relu", get("relu"), nn.ReLU)
            or block_conv_reason("conv2", get("conv2"), 3, stride=1)
            or norm_reason("bn2", get("bn2"))
        )

    def fused_arguments(self) -> dict:
        modules = self.__dict__["_modules"]
        return {
            "conv1_weight": conv_weight(modules["conv1"]),
            "bn1": batch_norm_params(modules["bn1"]),
            "conv2_weight": conv_weight(modules["conv2"]),
            "bn2": batch_norm_params(modules["bn2"]),
            "stride": self.fused_stride(),
        }

    def fused_forward(self, x: Tensor) -> Tensor:
        return functional.basic_block(x, **self.fused_arguments(), **self.fused_shortcut(x), backend=self.backend)


class FusedBottleneck(FusedBlock):
    """Runs a block with the children of `StockBottleneck` through `fastres.functional.bottleneck`."""

    unit = "bottleneck"
    params = functional.BottleneckParams

    def fused_reason(self) -> str | None:
        get = self.__dict__["_modules"].get
        return (
            block_conv_reason("conv1", get("conv1"), 1)
            or norm_reason("bn1", get("bn1"))
            # The stride is on one of the two, as in the paper or as in torchvision.
            or block_conv_reason(
                "conv2",
                get("conv2"),
                3,
                stride=None if get("conv1").__dict__["stride"] == (1, 1) else 1,
                dilation=None,
                groups=None,
            )
            or norm_reason("bn2", get("bn2"))
            or block_conv_reason("conv3", get("conv3"), 1, stride=1)
            or norm_reason("bn3", get("bn3"))
            or child_reason("relu", get("relu"), nn.ReLU)
        )

    def fused_arguments(self) -> dict:
        modules = self.__dict__["_modules"]
        middle = modules["conv2"].__dict__
        return {
            "conv1_weight": conv_weight(modules["conv1"]),
            "bn1": batch_norm_params(modules["bn1"]),
            "conv2_weight": conv_weight(modules["conv2"]),
            "bn2": batch_norm_params(modules["bn2"]),
            "conv3_weight": conv_weight(modules["conv3"]),
            "bn3": batch_norm_params(modules["bn3"]),
            "stride": self.fused_stride(),
            "stride_on_1x1": modules["conv1"].__dict__["stride"] != (1, 1),
            "dilation": middle["dilation"][0],
            "groups": middle["groups"],
        }

    def fused_forward(self, x: Tensor) -> Tensor:
        return functional.bottleneck(x, **self.fused_arguments(), **self.fused_shortcut(x), backend=self.backend)


class BasicBlock(FusedBasicBlock, StockBasicBlock):
    """relu(BN(conv3x3(relu(BN(conv3x3(x))))) + shortcut), fused: the block of ResNet-18 and 34.

    `[N, in_channels, H, W]` -> `[N, planes, ceil(H/stride), ceil(W/stride)]`.

    Args:
        in_channels, planes: channels of the input and of the output.
        stride: of the first conv.
        downsample: the shortcut; None is the identity. `projection_shortcut` is fused with the block, any other module
            runs by itself. See `make_shortcut`.
        groups, base_width, dilation: only 1, 64 and 1; here for torchvision's order. ValueError otherwise.
        norm_layer: makes a norm from a number of channels; with others than nn.BatchNorm2d the children run one by one.

    The attribute `backend` chooses the kernels, see `fastres.backends.CHOICES`.
    """

    stock_class = StockBasicBlock


class Bottleneck(FusedBottleneck, StockBottleneck):
    """relu(BN(conv1x1(relu(BN(conv3x3(relu(BN(conv1x1(x)))))))) + shortcut), fused: the block of ResNet-50 and deeper.

    `[N, in_channels, H, W]` -> `[N, 4*planes, ceil(H/stride), ceil(W/stride)]`.

    Args:
        in_channels, planes: channels of the input, and a quarter of the output's.
        stride: of the 3x3 conv, as in torchvision.
        downsample: the shortcut; None is the identity. `projection_shortcut` is fused with the block, any other module
            runs by itself. See `make_shortcut`.
        groups, base_width: the 3x3 conv has `int(planes*base_width/64)*groups` channels in `groups` groups.
        dilation: of the 3x3 conv.
        norm_layer: makes a norm from a number of channels; with others than nn.BatchNorm2d the children run one by one.
        stride_on_1x1: put the stride on the first 1x1 conv, as the paper does.

    The attribute `backend` chooses the kernels, see `fastres.backends.CHOICES`.
    """

    stock_class = StockBottleneck
