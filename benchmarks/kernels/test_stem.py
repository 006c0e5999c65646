"""The stem's batch norm, ReLU and max-pool, both directions, against eager's three operators and their autograd."""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import kernels
from fastres.measure.shapes import POOL


@pytest.mark.core("cuda", "cpu")
def test_stem(batch, dtype, device, measure):
    measure(kernels.experiments(cases.BY_NAME["stem"], dtype, device, {"n": batch} | POOL))
