"""ResNets for small images (CIFAR, MNIST), and their plain counterparts.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.nn import ConvBNReLU2d

from .stages import initialize, make_stage


class CifarResNet(nn.Module):
    """A 3x3 conv, three stages of widths w, 2w and 4w, and one linear layer: `[N, in_channels, H, W]` -> logits.

    The second and third stage halve the image. With n blocks in a stage there are 6n + 2 layers with weights (9n + 2
    with bottlenecks). state_dict keys: `stem`, `layer1` to `layer3`, `fc`.

    Args:
        blocks_per_stage: n.
        block: "basic"; "bottleneck", whose outputs are four times as wide; or "plain", without shortcuts.
        width: w, 16 in the paper.
        num_classes, in_channels: size of the output and channels of the input.
        shortcut: "A", the default as in the paper, pads with zeros where dimensions change; "B" projects there; "C"
            projects in every block.
        zero_init_residual: start the last batch norm of each block at 0, so that each block starts as its shortcut.

    Raises ValueError for an unknown block or shortcut, and for options that the block does not have.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        block: str = "basic",
        *,
        width: int = 16,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: str | None = None,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        if blocks_per_stage < 1:
            raise ValueError(f"blocks_per_stage must be at least 1, is {blocks_per_stage}")
        if shortcut is None and block != "plain":
            shortcut = "A"
        self.stem = ConvBNReLU2d(in_channels, width)
        self.layer1, channels = make_stage(block, width, width, blocks_per_stage, 1, shortcut=shortcut)
        self.layer2, channels = make_stage(block, channels, 2 * width, blocks_per_stage, 2, shortcut=shortcut)
        self.layer3, channels = make_stage(block, channels, 4 * width, blocks_per_stage, 2, shortcut=shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet20(**options) -> CifarResNet:
    """6n + 2 with n = 3: 0.27 M parameters. Takes `CifarResNet`'s keyword arguments."""
    return CifarResNet(3, **options)


def cifar_resnet32(**options) -> CifarResNet:
    """6n + 2 with n = 5: 0.46 M parameters. Takes `CifarResNet`'s keyword arguments."""
    return CifarResNet(5, **options)


def cifar_resnet44(**options) -> CifarResNet:
    """6n + 2 with n = 7: 0.66 M parameters. Takes `CifarResNet`'s keyword arguments."""
    return CifarResNet(7, **options)


def cifar_resnet56(**options) -> CifarResNet:
    """6n + 2 with n = 9: 0.85 M parameters. Takes `CifarResNet`'s keyword arguments."""
    return CifarResNet(9, **options)


def cifar_resnet110(**options) -> CifarResNet:
    """6n + 2 with n = 18: 1.7 M parameters. Takes `CifarResNet`'s keyword arguments."""
    return CifarResNet(18, **options)


def cifar_resnet11_bottleneck(**options) -> CifarResNet:
    """9n + 2 with n = 1, from bottlenecks with projections. Takes `CifarResNet`'s keyword arguments."""
    return CifarResNet(1, "bottleneck", **{"shortcut": "B", **options})


def cifar_resnet20_bottleneck(**options) -> CifarResNet:
    """9n + 2 with n = 2, from bottlenecks with projections. Takes `CifarResNet`'s keyword arguments."""
    return CifarResNet(2, "bottleneck", **{"shortcut": "B", **options})


def cifar_plain20(**options) -> CifarResNet:
    """`cifar_resnet20` without shortcuts. Takes `width`, `num_classes` and `in_channels`."""
    return CifarResNet(3, "plain", **options)


def cifar_plain32(**options) -> CifarResNet:
    """`cifar_resnet32` without shortcuts. Takes `width`, `num_classes` and `in_channels`."""
    return CifarResNet(5, "plain", **options)


def cifar_plain44(**options) -> CifarResNet:
    """`cifar_resnet44` without shortcuts. Takes `width`, `num_classes` and `in_channels`."""
    return CifarResNet(7, "plain", **options)


def cifar_plain56(**options) -> CifarResNet:
    """`cifar_resnet56` without shortcuts. Takes `width`, `num_classes` and `in_channels`."""
    return CifarResNet(9, "plain", **options)
