"""What the batch norm kernels compile to, for GPUs that are not there: the demands that are theirs alone.

Those on every kernel are in `fastres.inspection`, checked case by case in `tests/kernels`.
"""

from __future__ import annotations

import pytest
import torch

from fastres import inspection, static_checks
from fastres.static_checks import Request

pytest.importorskip("triton", reason="triton is not installed")

HEAVIEST = [
    "statistics, momentum None",
    "bn_act, shortcut projected, ReLU",
    "bn_bwd_reduce, mask output, two branches",
    "bn_bwd_apply, mask output, shortcut projected",
]

STREAMING = {
    *("_add_masked_kernel", "_channel_stats_kernel"),
    *("_bn_act_kernel", "_bn_bwd_reduce_kernel", "_bn_bwd_apply_kernel"),
}
SMALL = {"_bn_finalize_kernel", "_bn_constants_kernel", "_bn_bwd_finalize_kernel"}


@pytest.fixture(scope="module")
def launches(compiled):
    """What was launched and compiled, for all parts: names and figures."""
    rows = [
        (f"{request} on sm_{part}", row) for (request, part), rows in compiled("batch_norm").items() for row in rows
    ]
    assert {row.kernel for _, row in rows} == STREAMING | SMALL
    return rows


def accesses(row):
    return {kind for kind in row.instructions if kind.startswith(("LDG", "STG"))}


def test_every_access_to_activations_is_16_bytes_wide(launches):
    streaming = [(name, row) for name, row in launches if row.kernel in STREAMING]
    assert any("c 24" in name for name, _ in streaming)
    for name, row in streaming:
        # The only narrow accesses are the stores of partial sums, once per program.
        sums = row.kernel in ("_channel_stats_kernel", "_bn_bwd_reduce_kernel")
        assert accesses(row) - ({"STG.32", "STG.64"} if sums else set()) <= {"LDG.128", "LDGSTS.128", "STG.128"}, name


def test_loads_of_activations_are_asynchronous(launches):
    assert [name for name, row in launches if row.kernel in STREAMING and not row.count("LDGSTS.128")] == []


def test_partials_are_read_asynchronously_and_16_bytes_at_a_time(launches):
    for name, row in launches:
        if row.kernel in SMALL - {"_bn_constants_kernel"}:
            # Two operands in accesses of 16 bytes, two of them per thread; three tiles.
            assert row.count("LDGSTS.128") == 12, name


def test_all_programs_run_at_the_same_time(launches):
    """A program left over for a second round would double the time."""
    from fastres.kernels.triton._common import MULTIPROCESSORS

    assert [name for name, row in launches if row.programs > row.resident * MULTIPROCESSORS[row.part]] == []


SIZES = {
    "one value": {"n": 1, "h": 1, "w": 1, "c": 1},
    "channels in eights": {"n": 2, "h": 3, "w": 3, "c": 40},
    "channels in no eights": {"n": 2, "h": 3, "w": 3, "c": 27},
    "2**32 rows": {"n": 4096, "h": 1024, "w": 1024, "c": 16},
}


@pytest.fixture(scope="module")
def odd_sizes():
    wanted = [Request.of(name, torch.bfloat16, **sizes) for name in HEAVIEST for sizes in SIZES.values()]
    return static_checks.figures(wanted, [90])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", HEAVIEST)
def test_sizes_that_triton_specialises_on_compile(name, size, odd_sizes):
    request = Request.of(name, torch.bfloat16, **SIZES[size])
    for row in odd_sizes[request, 90]:
        assert inspection.problems(row) == []
        if size == "channels in eights" and row.kernel in STREAMING:
            assert accesses(row) - {"STG.32", "STG.64"} <= {"LDG.128", "LDGSTS.128", "STG.128"}
