"""The first layers of a ResNet for large images: 7x7 conv, batch norm, ReLU and 3x3 max-pool, both with stride 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres import functional

from .fused import FusedUnit
from .guard import batch_norm_params, child_reason, conv_reason, conv_weight, norm_reason


class StockStem(nn.Module):
    """`Stem` with its children run one by one."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class FusedStem(FusedUnit):
    """Runs the children `conv1`, `bn1`, `relu` and `maxpool` through `fastres.functional.stem`."""

    unit = "stem"

    def fused_reason(self) -> str | None:
        get = self.__dict__["_modules"].get
        reason = (
            conv_reason("conv1", get("conv1"))
            or norm_reason("bn1", get("bn1"))
            or child_reason("relu", get("relu"), nn.ReLU)
            or child_reason("maxpool", get("maxpool"), nn.MaxPool2d)
        )
        if reason is not None:
            return reason
        conv, pool = get("conv1").__dict__, get("maxpool").__dict__
        if conv["groups"] != 1 or conv["dilation"] != (1, 1):
            return "conv1 has groups or dilation"
        if (
            pool["kernel_size"] not in (3, (3, 3))
            or pool["stride"] not in (2, (2, 2))
            or pool["padding"] not in (1, (1, 1))
            or pool["dilation"] not in (1, (1, 1))
            or pool["ceil_mode"]
            or pool["return_indices"]
        ):
            return "maxpool is not 3x3 with stride 2 and padding 1"
        return None

    def fused_forward(self, x: Tensor) -> Tensor:
        modules = self.__dict__["_modules"]
        conv = modules["conv1"].__dict__
        return functional.stem(
            x,
            conv_weight(modules["conv1"]),
            batch_norm_params(modules["bn1"]),
            stride=conv["stride"],
            padding=conv["padding"],
            backend=self.backend,
        )


class FusedResNet(FusedStem):
    """A ResNet, torchvision's or `fastres.models.ResNet`, whose stem is four children of the model itself."""

    def fused_forward(self, x: Tensor) -> Tensor:
        x = super().fused_forward(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Stem(FusedStem, StockStem):
    """maxpool(relu(BN(conv7x7(x)))), fused. state_dict keys as in torchvision's ResNet: `conv1.weight` and `bn1.*`.

    `[N, in_channels, H, W]` -> `[N, out_channels, ceil(H/4), ceil(W/4)]`.

    The attribute `backend` chooses the kernels, see `fastres.backends.CHOICES`.
    """

    stock_class = StockStem
