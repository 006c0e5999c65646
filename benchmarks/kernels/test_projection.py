"""ResNet-50's four projection shortcuts with their batch norm, forward and backward, which adds to dx.

The whole is compared with eager's convolution and batch norm and their autograd, the kernels one by one with eager's
convolution alone.
"""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import eager, kernels
from fastres.measure.shapes import BLOCKS


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param("layer2.0", marks=pytest.mark.core("cuda")),
        pytest.param("layer3.0", marks=pytest.mark.core("cpu")),
        *("layer1.0", "layer4.0"),
    ],
)
def test_projection(layer, batch, dtype, device, measure):
    block = BLOCKS[layer]

    def fprop(t):
        return eager.conv(t["x"], t["conv_weight"], block.stride)

    def backward(t, **wanted):
        return eager.conv_backward(t["g"], t["x"], t["conv_weight"], block.stride, **wanted)

    single = {
        "projection_fprop": fprop,
        "projection_dgrad": lambda t: backward(t, wgrad=False),
        "projection_wgrad": lambda t: backward(t, dgrad=False),
    }
    case = cases.BY_NAME[f"projection, stride {block.stride}"]
    measure(kernels.experiments(case, dtype, device, block.shortcut(batch), eager=single))
