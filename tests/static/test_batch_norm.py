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
    "bn_act, shortcut projected, ReLU",
    "bn_bwd_reduce, mask output, two branches",
    "bn_bwd_apply, mask output, shortcut projected",
]


@pytest.fixture(scope="module")
def launches(compiled):
    """What was launched and compiled, for all parts: names and figures."""
    rows = [
        (f"{request} on sm_{part}", row) for (request, part), rows in compiled("batch_norm").items() for row in rows
    ]
    assert {row.kernel for _, row in rows} == {"_bn_act_kernel", "_bn_bwd_reduce_kernel", "_bn_bwd_apply_kernel"}
    return rows


def test_every_access_to_activations_is_16_bytes_wide(launches):
    for name, row in launches:
        # The only narrow accesses are the stores of partial sums, once per program.
        allowed = {"STG.32", "STG.64"} if row.kernel == "_bn_bwd_reduce_kernel" else set()
        accesses = {kind for kind in row.instructions if kind.startswith(("LDG", "STG"))}
        assert accesses - allowed <= {"LDG.128", "LDGSTS.128", "STG.128"}, name


def test_loads_of_activations_are_asynchronous(launches):
    assert [name for name, row in launches if not row.count("LDGSTS.128")] == []


def test_all_programs_run_at_the_same_time(launches):
    """A program left over for a second round would double the time."""
    from fastres.kernels.triton._common import MULTIPROCESSORS

    assert [name for name, row in launches if row.programs > row.resident * MULTIPROCESSORS[row.part]] == []


SIZES = {
    "one value": {"n": 1, "h": 1, "w": 1, "c": 1},
    "channels that are no multiple of 16": {"n": 2, "h": 3, "w": 3, "c": 24},
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
    (row,) = odd_sizes[request, 90]
    assert inspection.problems(row) == []
