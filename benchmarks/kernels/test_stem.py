"""The stem's batch norm, ReLU and max-pool.

Both directions with the sums between them are compared with eager's three operators and their autograd, the forward
alone with the three operators.
"""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import kernels
from fastres.measure.shapes import POOL


@pytest.mark.core("cuda", "cpu")
def test_stem(batch, dtype, device, measure):
    single = {"stem_pool": cases.BY_NAME["stem_pool"].stock}
    measure(kernels.experiments(cases.BY_NAME["stem"], dtype, device, {"n": batch} | POOL, eager=single))
