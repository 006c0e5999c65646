"""Blocks and other units: forward, backward and both, stock eager and compiled against fused.

On a CPU the images are a quarter as high and wide as in the network.
"""

from __future__ import annotations

import pytest

from fastres.measure import training
from fastres.measure.shapes import BLOCKS, PROJECTIONS
from fastres.models.stages import make_stage
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU2d, Projection, Stem, make_shortcut

# size, channels, planes and stride of ResNet-18's blocks
BASIC_BLOCKS = {
    "layer1.1": (56, 64, 64, 1),
    "layer2.0": (56, 64, 128, 2),
    "layer3.1": (14, 256, 256, 1),
}

# size, channels, planes, blocks and stride of ResNet-50's stages
STAGES = {"layer1": (56, 64, 64, 3, 1), "layer3": (28, 512, 256, 6, 2)}

CORE_PROJECTIONS = ("resnet50 layer1", "resnet50 layer2", "resnet50 layer3")


@pytest.fixture
def measure_unit(batch, dtype, device, measure, modes):
    def run(name: str, make, channels: int, size: int) -> None:
        size = size if device.type == "cuda" else size // 4
        compiled = modes("default") if device.type == "cuda" else modes()
        measure([training.unit_training(name, make, (batch, channels, size, size), dtype, device, compiled)])

    return run


@pytest.mark.parametrize(
    "layer",
    [
        # identity, projection, stride 2
        *(pytest.param(name, marks=pytest.mark.core("cuda", "cpu")) for name in ("layer1.1", "layer1.0", "layer2.0")),
        *(name for name in BLOCKS if name not in ("layer1.1", "layer1.0", "layer2.0")),
    ],
)
def test_bottleneck(layer, measure_unit):
    size, channels, width, stride = BLOCKS[layer]

    def make():
        return Bottleneck(channels, width, stride, make_shortcut("B", channels, 4 * width, stride))

    measure_unit(f"Bottleneck {layer}", make, channels, size)


@pytest.mark.parametrize("layer", [pytest.param("layer1", marks=pytest.mark.core("cuda")), "layer3"])
def test_stage(layer, measure_unit):
    size, channels, *rest = STAGES[layer]
    measure_unit(f"Stage {layer}", lambda: make_stage("bottleneck", channels, *rest)[0], channels, size)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param("layer1.1", marks=pytest.mark.core("cuda", "cpu")),
        pytest.param("layer2.0", marks=pytest.mark.core("cuda", "cpu")),
        "layer3.1",
    ],
)
def test_basic_block(layer, measure_unit):
    size, channels, planes, stride = BASIC_BLOCKS[layer]

    def make():
        return BasicBlock(channels, planes, stride, make_shortcut("B", channels, planes, stride))

    measure_unit(f"BasicBlock {layer}", make, channels, size)


@pytest.mark.parametrize(
    "layer",
    [pytest.param(name, marks=pytest.mark.core("cuda")) if name in CORE_PROJECTIONS else name for name in PROJECTIONS],
)
def test_projection(layer, measure_unit):
    """By the plan; benchmarks/kernels/test_projection.py measures every way."""
    size, channels, outputs, stride = PROJECTIONS[layer]
    measure_unit(f"Projection {layer}", lambda: Projection(channels, outputs, stride), channels, size)


@pytest.mark.core("cuda", "cpu")
def test_conv_bn_relu(measure_unit):
    measure_unit("ConvBNReLU2d", lambda: ConvBNReLU2d(64, 64), 64, 56)


@pytest.mark.core("cuda", "cpu")
def test_stem(measure_unit):
    measure_unit("Stem", Stem, 3, 224)
