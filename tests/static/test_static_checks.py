"""The checks themselves: each finds what it is there to find."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "registers, shared, num_warps, resident",
    [(255, 0, 8, 1), (64, 0, 4, 8), (32, 100 * 1024, 4, 2), (32, 0, 4, 16), (65, 0, 4, 7)],
)
def test_resident_programs_follow_the_scarcest_resource(registers, shared, num_warps, resident):
    figures = Figures("kernel", 90, num_warps, 1, 1, registers=registers, shared=shared)
    assert figures.resident == resident


def test_a_failing_worker_says_why():
    with pytest.raises(RuntimeError, match="no such case"):
        static_checks.figures([Request.of("no such case", torch.float32)], [90])
