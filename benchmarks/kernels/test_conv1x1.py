"""The reducing 1x1 convolutions of ResNet-50's blocks.

Eager is the convolution alone. Ours also gives the statistics; backward forms the gradient behind the batch norm as it
loads, and adds the shortcut's.
"""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import eager, kernels
from fastres.measure.shapes import BLOCKS

LAYERS = [
    *("layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0", "layer4.1"),
    pytest.param("layer1.1", marks=pytest.mark.core("cuda")),
    pytest.param("layer3.1", marks=pytest.mark.core("cuda", "cpu")),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_forward(layer, batch, dtype, device, measure):
    case, sizes = cases.BY_NAME["conv1x1, stride 1"], BLOCKS[layer].reduce(batch)

    def run(k, t):
        k.conv1x1(**t)

    def stock(t):
        eager.conv(t["x"], t["weight"])

    measure(kernels.experiments(case, dtype, device, sizes, run=run, stock=stock))


def stock_backward(t, **wanted):
    return eager.conv_backward(t["g"], t["x"], t["weight"], **wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_backward(layer, batch, dtype, device, measure):
    case, sizes = cases.BY_NAME["conv1x1 backward, stride 1, residual"], BLOCKS[layer].reduce(batch)
    single = {
        "conv1x1_dgrad, bn, grad, y, residual": lambda t: stock_backward(t, wgrad=False),
        "conv1x1_wgrad, bn, grad, y": lambda t: stock_backward(t, dgrad=False),
    }
    measure(kernels.experiments(case, dtype, device, sizes, stock=stock_backward, eager=single))


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer not in ("layer3.0", "layer4.0", "layer4.1")])
def test_backward_in_one_pass(layer, batch, dtype, device, measure):
    """Triton's takes two passes for more than 128 output channels, those of layer3 here; the library's always does."""
    case, sizes = cases.BY_NAME["conv1x1 backward in one pass, residual"], BLOCKS[layer].reduce(batch)
    measure(kernels.experiments(case, dtype, device, sizes, stock=stock_backward))
