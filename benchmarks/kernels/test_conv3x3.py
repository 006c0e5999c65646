"""The 3x3 convolutions of ResNet-50's blocks, in the forms that a bottleneck uses.

Eager is the convolution alone. Ours also gives the statistics; dgrad masks by the ReLU before the conv and gives the
sums for its batch norm, wgrad forms the conv's input from the raw one. The library's rows have PyTorch's passes around
its convolutions; a plan has Triton's there.
"""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import eager, kernels
from fastres.measure.shapes import BLOCKS

LAYERS = [
    *("layer2.0", "layer2.1", "layer3.0", "layer4.0", "layer4.1"),
    pytest.param("layer1.1", marks=pytest.mark.core("cuda")),
    pytest.param("layer3.1", marks=pytest.mark.core("cuda", "cpu")),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_conv3x3(layer, batch, dtype, device, measure):
    stride = BLOCKS[layer].stride

    def run(k, t):
        y, dy, weight = t["y"], t["dy"], t["weight"]
        k.conv3x3(y, weight, stride)
        k.conv3x3_dgrad(dy, weight, y.shape[1:3], stride, y=y, bn=t["bn"])
        k.conv3x3_wgrad(y, dy, stride, bn=t["bn"])

    def forward(t):
        return eager.conv(t["y"], t["weight"], stride, 1)

    def backward(t, **wanted):
        return eager.conv_backward(t["dy"], t["y"], t["weight"], stride, 1, **wanted)

    def stock(t):
        forward(t)
        backward(t)

    case = cases.BY_NAME["conv3x3" if stride == 1 else f"conv3x3, stride {stride}"]
    single = {
        "conv3x3": forward,
        "conv3x3_dgrad, y, bn": lambda t: backward(t, wgrad=False),
        "conv3x3_wgrad, bn": lambda t: backward(t, dgrad=False),
    }
    measure(kernels.experiments(case, dtype, device, BLOCKS[layer].middle(batch), run=run, stock=stock, eager=single))
