"""What the stem's kernels compile to, for GPUs that are not there: the demands that are theirs alone.

Those on every kernel are in `fastres.inspection`, checked case by case in `tests/kernels`.
"""

from __future__ import annotations

import pytest
import torch

from fastres import inspection, static_checks
from fastres.static_checks import Request

pytest.importorskip("triton", reason="triton is not installed")

NAMES = ["stem_pool", "stem_pool_bwd", "stem_pool_bwd, constant"]


@pytest.fixture(scope="module")
def launches(compiled):
    """What was launched and compiled where channels fill 16 bytes, for all parts: names, bytes of a value, figures."""
    rows = []
    for (request, part), figures in compiled("stem").items():
        itemsize = getattr(torch, request.dtype).itemsize
        if dict(request.sizes)["c"] * itemsize % 16 == 0:
            rows += [(f"{request} on sm_{part}", itemsize, row) for row in figures]
    assert {row.kernel for *_, row in rows} == {"_stem_pool_kernel", "_stem_pool_bwd_kernel"}
    return rows


def test_accesses_to_activations_are_16_bytes_wide(launches):
    for name, itemsize, row in launches:
        accesses = {kind for kind in row.instructions if kind.startswith(("LDG", "STG"))}
        # argmax has a byte for each of the 16 bytes' values.
        codes = 8 * 16 // itemsize
        forward = row.kernel == "_stem_pool_kernel"
        narrow = {f"STG.{codes}"} if forward else {f"LDG.{codes}", f"LDGSTS.{codes}"}
        assert accesses == {"LDG.128", "LDGSTS.128", "STG.128"} | narrow, name


def test_loads_of_a_step_are_asynchronous_and_a_step_ahead(launches):
    for name, _, row in launches:
        # Of a step: six taps; or two windows' gradients and codes, and y of four pixels. Two steps precede the loop.
        asynchronous = sum(count for kind, count in row.instructions.items() if kind.startswith("LDGSTS"))
        assert asynchronous == 3 * (6 if row.kernel == "_stem_pool_kernel" else 4 if "constant" in name else 8), name


SIZES = {
    "one value": {"n": 1, "h": 1, "w": 1, "c": 1},
    "one row": {"n": 3, "h": 1, "w": 9, "c": 24},
    "two rows": {"n": 1, "h": 2, "w": 1, "c": 80},
    "2**32 values in an image": {"n": 1, "h": 65536, "w": 8192, "c": 8},
    "2**32 columns": {"n": 2**22, "h": 2, "w": 2048, "c": 1},
}


@pytest.fixture(scope="module")
def odd_sizes():
    wanted = [Request.of(name, torch.bfloat16, **sizes) for name in NAMES for sizes in SIZES.values()]
    return static_checks.figures(wanted, [90])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_triton_specialises_on_compile(name, size, odd_sizes):
    request = Request.of(name, torch.bfloat16, **SIZES[size])
    (row,) = odd_sizes[request, 90]
    assert inspection.problems(row) == []
