"""ResNets for large images (ImageNet), with torchvision's names and state_dict keys, and their plain counterparts.

Sources: He et al., "Deep Residual Learning for Image Recognition" (2015), table 1; wide: Zagoruyko and Komodakis, "Wide
Residual Networks" (2016); ResNeXt: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks" (2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastres.nn.stem import FusedResNet

from .stages import initialize, make_stage


class StockResNet(nn.Module):
    """`ResNet` with the children of its stem run one by one."""

    def __init__(
        self,
        block: str,
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        groups: int = 1,
        width_per_group: int = 64,
        shortcut: str | None = None,
        stride_on_1x1: bool = False,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        if len(layers) != 4:
            raise ValueError(f"layers must have four numbers of blocks, one for each stage, has {len(layers)}")
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        options = {
            "shortcut": shortcut,
            "groups": groups,
            "base_width": width_per_group,
            "stride_on_1x1": stride_on_1x1,
        }
        self.layer1, channels = make_stage(block, 64, 64, layers[0], 1, **options)
        self.layer2, channels = make_stage(block, channels, 128, layers[1], 2, **options)
        self.layer3, channels = make_stage(block, channels, 256, layers[2], 2, **options)
        self.layer4, channels = make_stage(block, channels, 512, layers[3], 2, **options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ResNet(FusedResNet, StockResNet):
    """A ResNet for images of about 224x224: `[N, in_channels, H, W]` -> logits `[N, num_classes]`.

    Weights of torchvision's model of the same name load, and the reverse.

    Args:
        block: "basic", "bottleneck", or "plain" for two convs without a shortcut.
        layers: number of blocks in each of the four stages.
        num_classes, in_channels: size of the output and channels of the input.
        groups, width_per_group: of the 3x3 convs in bottlenecks: 32 and 4 make a ResNeXt-50 32x4d, 1 and 128 a wide
            ResNet-50-2.
        shortcut: "A" pads with zeros and "B", the default, projects where dimensions change; "C" projects in every
            block.
        stride_on_1x1: put a bottleneck's stride on its first conv, as in the paper, not on the 3x3, as in torchvision.
        zero_init_residual: start the last batch norm of each block at 0, so that each block starts as its shortcut.

    Raises ValueError for an unknown block or shortcut, and for options that the block does not have.
    """

    stock_class = StockResNet


def resnet18(**options) -> ResNet:
    """ResNet-18: 11.7 M parameters at 1000 classes. Takes `ResNet`'s keyword arguments."""
    return ResNet("basic", (2, 2, 2, 2), **options)


def resnet34(**options) -> ResNet:
    """ResNet-34: 21.8 M parameters at 1000 classes. Takes `ResNet`'s keyword arguments."""
    return ResNet("basic", (3, 4, 6, 3), **options)


def resnet50(**options) -> ResNet:
    """ResNet-50: 25.6 M parameters at 1000 classes. Takes `ResNet`'s keyword arguments."""
    return ResNet("bottleneck", (3, 4, 6, 3), **options)


def resnet101(**options) -> ResNet:
    """ResNet-101: 44.5 M parameters at 1000 classes. Takes `ResNet`'s keyword arguments."""
    return ResNet("bottleneck", (3, 4, 23, 3), **options)


def resnet152(**options) -> ResNet:
    """ResNet-152: 60.2 M parameters at 1000 classes. Takes `ResNet`'s keyword arguments."""
    return ResNet("bottleneck", (3, 8, 36, 3), **options)


def wide_resnet50_2(**options) -> ResNet:
    """Wide ResNet-50-2, with 3x3 convs twice as wide: 68.9 M parameters at 1000 classes. Takes `ResNet`'s arguments."""
    return ResNet("bottleneck", (3, 4, 6, 3), **{"width_per_group": 128, **options})


def resnext50_32x4d(**options) -> ResNet:
    """ResNeXt-50 32x4d, with 3x3 convs in 32 groups: 25.0 M parameters at 1000 classes. Takes `ResNet`'s arguments."""
    return ResNet("bottleneck", (3, 4, 6, 3), **{"groups": 32, "width_per_group": 4, **options})


def plain18(**options) -> ResNet:
    """ResNet-18 without shortcuts, from `fastres.nn.ConvBNReLU2d`. Takes `num_classes` and `in_channels`."""
    return ResNet("plain", (2, 2, 2, 2), **options)


def plain34(**options) -> ResNet:
    """ResNet-34 without shortcuts, from `fastres.nn.ConvBNReLU2d`. Takes `num_classes` and `in_channels`."""
    return ResNet("plain", (3, 4, 6, 3), **options)
