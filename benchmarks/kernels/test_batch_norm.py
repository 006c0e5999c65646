"""The batch norm kernels against eager PyTorch.

Eager's batch norm does more in one operator: forward it normalises beside the statistics, backward it reduces and
applies.
"""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import eager, kernels

CASES = (
    "statistics, momentum 0.1",
    "bn_act, shortcut none, ReLU",
    "bn_act, shortcut identity, ReLU",
    "bn_act, shortcut projected, ReLU",
    "bn_bwd_reduce, mask output",
    "bn_bwd_reduce, mask output, two branches",
    "bn_bwd_mask",
    "add_masked",
    "bn_bwd_apply, mask output, shortcut identity",
    "bn_bwd_apply, mask output, shortcut projected",
)
SHAPES = (
    pytest.param(56, 64),
    pytest.param(56, 256, marks=pytest.mark.core("cuda")),
    pytest.param(28, 512),
    pytest.param(14, 1024, marks=pytest.mark.core("cuda", "cpu")),
    pytest.param(7, 2048),
)


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_batch_norm(name, size, channels, batch, dtype, device, measure):
    case, sizes = cases.BY_NAME[name], {"n": batch, "h": size, "w": size, "c": channels}
    run = statistics if name.startswith("statistics") else None
    measure(kernels.experiments(case, dtype, device, sizes, run=run, stock=eager.BatchNorm()))


def statistics(k, t):
    """Without adding up the partial sums for a comparison, as the case does."""
    running = t["running_mean"], t["running_var"], t["num_batches_tracked"]
    k.bn_finalize(k.channel_stats(t["y"]), t["weight"], t["bias"], *running, 0.1, 1e-5)
