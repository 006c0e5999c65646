"""What the Triton GEMMs compile to, for GPUs that are not there: the demands that are theirs alone.

Those on every kernel are in `fastres.inspection`, checked case by case in `tests/kernels`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

FAMILIES = ("conv1x1", "conv3x3", "expand", "gram")
BOTH_FROM_SHARED_MEMORY = (
    *("_conv1x1_fprop_kernel", "_conv3x3_fprop_kernel", "_conv3x3_dgrad_kernel"),
    *("_expand_resident_kernel", "_expand_dgrad_kernel"),
)
SMALLEST_SHARED = 99 * 1024  # of compute capabilities 8.6 and 8.9, which run the tiles behind the preferred ones


@pytest.fixture(scope="module", params=FAMILIES)
def launches(request, compiled):
    """What was launched and compiled: requests, parts and figures of the kernels that multiply tiles of pixels."""
    return [
        (wanted, part, row)
        for (wanted, part), rows in compiled(request.param).items()
        for row in rows
        if "TMA" in row.configuration
    ]


def test_tma_loads_what_it_can(launches):
    """16-bit operands whose rows are multiples of 16 bytes, on a part that has it; else copies are asynchronous."""
    seen = set()
    for wanted, part, row in launches:
        sizes = dict(wanted.sizes)
        fits = wanted.dtype != "float32" and all(sizes[name] % 8 == 0 for name in "kc" if name in sizes)
        tma = part >= 90 and fits
        assert bool(row.configuration["TMA"]) is tma, (wanted, part, row.kernel)
        seen.add(tma)
        if row.configuration["TMA"]:
            assert row.count("UTMALDG") > 0, (wanted, part, row.kernel)
        else:
            assert any(kind.startswith("LDGSTS") for kind in row.instructions), (wanted, part, row.kernel)
    assert seen == {True, False}


def test_operands_come_from_shared_memory_where_no_prologue_forces_registers(launches):
    for wanted, part, row in launches:
        if part == 90 and row.kernel in BOTH_FROM_SHARED_MEMORY and row.configuration["TMA"]:
            assert row.count("HGMMA") > 0 and row.count("HGMMA with A in registers") == 0, (wanted, row.kernel)


def test_the_tile_behind_the_preferred_one_is_smaller(launches, all_parts):
    if not all_parts:
        pytest.skip("the tiles behind the preferred ones are compiled with --all-parts only")
    behind = [(wanted, part, row) for wanted, part, row in launches if wanted.tile == 1]
    assert behind
    for wanted, part, row in behind:
        assert row.registers < 200 and row.shared <= SMALLEST_SHARED, (wanted, part, row.kernel, row.registers)
