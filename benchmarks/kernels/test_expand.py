"""The expanding 1x1 convolution of a bottleneck with its batch norm, shortcut and ReLU, forward and backward.

The whole is compared with eager's convolution, batch norm, addition and ReLU, and their autograd; a kernel of the
folded form has no counterpart there.
"""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import kernels
from fastres.measure.shapes import BLOCKS


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param("layer1.1", marks=pytest.mark.core("cuda")),
        "layer2.1",
        pytest.param("layer3.1", marks=pytest.mark.core("cuda", "cpu")),
        "layer4.1",
    ],
)
def test_expand(layer, batch, dtype, device, measure):
    singles = "expand", "expand_dgrad", "expand_wgrad"
    measure(kernels.experiments(cases.BY_NAME["expand"], dtype, device, BLOCKS[layer].expand(batch), singles=singles))


@pytest.mark.parametrize("layer", [pytest.param("layer2.0", marks=pytest.mark.core("cuda")), "layer3.0", "layer4.0"])
def test_expand_with_a_projection(layer, batch, dtype, device, measure):
    """The projection as a second product, and its weight's gradient beside the last conv's."""
    singles, sizes = ("expand", "expand_wgrad"), BLOCKS[layer].expand(batch) | {"s": BLOCKS[layer].channels}
    case = cases.BY_NAME["expand, projection"]
    measure(kernels.experiments(case, dtype, device, sizes, whole=False, singles=singles))
