"""The Gram matrix in front of a bottleneck's last convolution, and the small matrices that follow from it.

Eager PyTorch has no counterpart: `test_expand.py` compares the whole unit.
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
def test_gram(layer, batch, dtype, device, measure):
    singles = "gram", "gram_finalize", "gram_bwd"
    sizes = BLOCKS[layer].expand(batch)
    measure(kernels.experiments(cases.BY_NAME["expand"], dtype, device, sizes, whole=False, singles=singles))
