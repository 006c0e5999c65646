"""The checks themselves: each finds what it is there to find."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastres import static_checks
from fastres.static_checks import Figures, Request

TTIR = """
    %base = arith.muli %row, %stride : {scalar}
    %first = tt.addptr %y, %base : !tt.ptr<bf16>, {scalar}
    %tile = tt.splat %first : !tt.ptr<bf16> -> tensor<32x64x!tt.ptr<bf16>>
    %at = tt.addptr %tile, %offsets : tensor<32x64x!tt.ptr<bf16>>, tensor<32x64x{tensor}>
    %value = tt.load %at, %inside, %zero : tensor<32x64x!tt.ptr<bf16>>
    %vector = tt.load %elsewhere, %few : tensor<64x!tt.ptr<f32>>
    tt.store %at, %value, %inside : tensor<32x64x!tt.ptr<bf16>>
"""


@pytest.mark.parametrize("scalar, tensor, narrow", [("i32", "i32", 2), ("i64", "i32", 0), ("i32", "i64", 0)])
def test_narrow_rows_are_tiles_without_a_64_bit_offset(scalar, tensor, narrow):
    assert len(static_checks.narrow_rows(TTIR.format(scalar=scalar, tensor=tensor))) == narrow


def test_a_name_that_another_branch_defines_again_stands_for_its_own():
    wide = "%at = tt.addptr %tile, %offsets : tensor<32x64x!tt.ptr<bf16>>, tensor<32x64xi64>"
    narrow = "%at = tt.addptr %tile, %offsets : tensor<32x64x!tt.ptr<bf16>>, tensor<32x64xi32>"
    load = "%{} = tt.load %at, %inside : tensor<32x64x!tt.ptr<bf16>>"
    for first, second, found in ((wide, narrow, "second"), (narrow, wide, "first")):
        branches = ["scf.if %p {", first, load.format("first"), "} else {", second, load.format("second"), "}"]
        assert static_checks.narrow_rows("\n".join(branches)) == [load.format(found)]


def test_pointers_that_a_loop_carries_count_as_narrow():
    loop = "  %value = tt.load %arg7, %inside : tensor<32x64x!tt.ptr<bf16>>"
    assert static_checks.narrow_rows(loop) == [loop.strip()]


def test_instructions_are_counted_by_kind_and_width():
    code = """
        /*0010*/ @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/ LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/ LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0040*/ LDGSTS.E.BYPASS.128 [R29], desc[UR20][R6.64], P1 ;
        /*0050*/ LDGDEPBAR ;
        /*0060*/ STG.E.64 desc[UR4][R2.64], R4 ;
        /*0070*/ STL [R1+0x8], R4 ;
        /*0080*/ LDL R4, [R1+0x8] ;
        /*0090*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00a0*/ HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
    """
    assert static_checks._instructions(code) == {
        "LDG.128": 1,
        "LDG.32": 1,
        "LDG.16": 1,
        "LDGSTS.128": 1,
        "STG.64": 1,
        "spill": 2,
        "HGMMA": 2,
        "HGMMA with A in registers": 1,
    }


def test_widths_are_those_of_global_accesses():
    figures = Figures("kernel", 90, {}, 1, 4, 3, instructions={"LDG.16": 3, "LDGSTS.128": 1, "HGMMA": 2, "STG.32": 1})
    assert figures.widths == [16, 32, 128]


@pytest.mark.parametrize(
    "part, registers, shared, tensor_memory, num_warps, resident",
    [
        (90, 255, 0, 0, 8, 1),
        (90, 64, 0, 0, 4, 8),
        (90, 65, 0, 0, 4, 7),
        (90, 32, 0, 0, 4, 16),
        (90, 32, 0, 0, 1, 32),
        (90, 32, 100 * 1024, 0, 4, 2),
        (90, 32, 227 * 1024, 0, 4, 1),
        (90, 32, 228 * 1024, 0, 4, 0),
        (80, 32, 100 * 1024, 0, 4, 1),
        (89, 32, 0, 0, 4, 12),
        (100, 32, 0, 128, 4, 4),
    ],
)
def test_resident_programs_follow_the_scarcest_resource(part, registers, shared, tensor_memory, num_warps, resident):
    figures = Figures("kernel", part, {}, 1, num_warps, 1, registers, 0, shared, tensor_memory)
    assert figures.resident == resident


def test_a_failing_worker_says_why():
    with pytest.raises(RuntimeError, match="no such case"):
        static_checks.figures([Request.of("no such case", torch.float32)], [90])


def test_bfloat16_stands_for_float16_unless_every_dtype_is_asked_for():
    few, all_ = (set(static_checks.requests("batch_norm", everything=every)) for every in (False, True))
    assert few and all_ - few == {dataclasses.replace(r, dtype="float16") for r in few if r.dtype == "bfloat16"}


def test_kept_figures_are_not_made_again(compiled):
    wanted, kept = next(iter(static_checks.requests("batch_norm"))), compiled("batch_norm")

    def progress(done, total):
        raise AssertionError("compiled again")

    assert static_checks.figures([wanted], [90], progress)[wanted, 90] == kept[wanted, 90]


# What compiled kernels show


def test_the_operand_of_a_matrix_product_is_seen_in_shared_memory_and_in_registers(planted):
    for name, in_registers in (("operands in shared memory", 0), ("operand in registers", 4)):
        figures = planted(name, 90)
        assert figures.count("HGMMA") == 4 and figures.count("HGMMA with A in registers") == in_registers
        assert figures.dots == {"16": 1} and not figures.count("HMMA")
        assert planted(name, 80).count("HMMA") and not planted(name, 80).count("HGMMA")


def test_tcgen05_and_its_memory_are_seen(planted):
    figures = planted("operands in shared memory", 100)
    assert figures.count("UTCMMA") and figures.tensor_memory == 128 and figures.resident <= 4


@pytest.mark.parametrize("name", ["descriptors", "descriptors of boxes"])
def test_descriptors_made_by_the_host_become_tma(name, planted):
    figures = planted(name, 90)
    assert figures.count("UTMALDG") and figures.count("UTMASTG") == 1
    assert figures.widths == [] and not figures.spills
    # Older parts have no TMA: there the compiler makes slow code of them.
    assert planted(name, 80).widths == [16] and not planted(name, 80).count("UTMALDG")


def test_a_configuration_holds_numbers_and_dtypes(planted):
    assert planted("descriptors", 90).configuration == {"OUT": "bf16", "BM": 128, "BN": 128, "BK": 64}
    expected = {"BM": 128, "BN": 128, "BK": 64, "SCALE": True, "NS": 3}
    assert planted("operand in registers", 90).configuration == expected


def test_stages_are_those_of_the_loop(planted):
    assert planted("too many stages", 90).num_stages == 9
    assert planted("too many stages", 90).shared == 9 * 2 * 128 * 64 * 2


def test_products_of_float32_are_told_from_those_of_16_bits(planted):
    figures = planted("float32", 90)
    assert figures.dots == {"32": 1} and not figures.count("HGMMA") and not figures.count("HMMA")
