"""The shapes that are measured: ResNet-50's, at 224x224."""

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

    def shortcut(self, n: int) -> dict[str, int]:
        """The projection of a stage's first block."""
        return {"n": n, "h": self.size, "w": self.size, "c": self.channels, "k": 4 * self.width}


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

STEM = {"h": 224, "w": 224, "c": 3, "k": 64, "r": 7, "s": 7}
"""Its conv."""

POOL = {"h": 112, "w": 112, "c": 64}
"""Its batch norm, ReLU and max-pool."""
