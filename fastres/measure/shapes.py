"""The shapes that are measured: those of ResNet-50 and, where they differ in kind, ResNet-18, at 224x224."""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """A bottleneck. size: height and width of its input. channels: of its input. width: of its 3x3 conv, a quarter of
    its output's channels. stride: of the 3x3 conv, and of the projection in the first block of a stage."""

    size: int
    channels: int
    width: int
    stride: int = 1

    @property
    def out_size(self) -> int:
        return self.size // self.stride

    def reduce(self, n: int) -> dict[str, int]:
        """The first 1x1 conv."""
        return {"n": n, "h": self.size, "w": self.size, "c": self.channels, "k": self.width}

    def middle(self, n: int) -> dict[str, int]:
        """The 3x3 conv."""
        return {"n": n, "h": self.size, "w": self.size, "c": self.width, "k": self.width}

    def expand(self, n: int) -> dict[str, int]:
        """The last 1x1 conv."""
        return {"n": n, "h": self.out_size, "w": self.out_size, "k": self.width, "c": 4 * self.width}


BLOCKS = {
    "layer1.0": Block(56, 64, 64),
    "layer1.1": Block(56, 256, 64),
    "layer2.0": Block(56, 256, 128, 2),
    "layer2.1": Block(28, 512, 128),
    "layer3.0": Block(28, 512, 256, 2),
    "layer3.1": Block(14, 1024, 256),
    "layer4.0": Block(14, 1024, 512, 2),
    "layer4.1": Block(7, 2048, 512),
}
"""One block of each kind; the later ones of a stage are like its second."""


class Projection(NamedTuple):
    """A projection shortcut. size: height and width of its input."""

    size: int
    channels: int
    out_channels: int
    stride: int = 2

    def sizes(self, n: int) -> dict[str, int]:
        return {"n": n, "h": self.size, "w": self.size, "c": self.channels, "k": self.out_channels}


PROJECTIONS = {
    "resnet50 layer1": Projection(56, 64, 256, 1),
    "resnet50 layer2": Projection(56, 256, 512),
    "resnet50 layer3": Projection(28, 512, 1024),
    "resnet50 layer4": Projection(14, 1024, 2048),
    "resnet18 layer2": Projection(56, 64, 128),
    "resnet18 layer3": Projection(28, 128, 256),
    "resnet18 layer4": Projection(14, 256, 512),
}
"""Of each stage's first block."""

STEM = {"h": 224, "w": 224, "c": 3, "k": 64, "r": 7, "s": 7}
"""Its conv."""

POOL = {"h": 112, "w": 112, "c": 64}
"""Its batch norm, ReLU and max-pool."""
