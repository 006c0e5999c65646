"""The numerics contract itself."""

from __future__ import annotations

import math

import pytest
import torch

from fastres.numerics import assert_sums, assert_three_way, relative_error, three_way, unit_roundoff

EXACT = torch.tensor([3.0, 4.0], dtype=torch.float64)  # norm 5


def off_by(error):
    return EXACT + torch.tensor([error, 0.0], dtype=torch.float64)


def test_error_may_be_twice_stocks_and_an_eighth_of_a_rounding_unit():
    eps = torch.finfo(torch.float32).eps
    result = three_way(off_by(2e-3), off_by(-1e-3), EXACT, torch.float32)
    assert result.ok and result.norm == 5
    assert result.bound == pytest.approx(2e-3 + eps / 8 * 5)
    assert result.share == pytest.approx(2e-3 / result.bound)
    assert not three_way(off_by(2.1e-3), off_by(-1e-3), EXACT, torch.float32).ok
    assert three_way(off_by(2.1e-3), off_by(-1e-3), EXACT, torch.float32, k=3.0).ok
    assert three_way(off_by(0.9 * eps / 8 * 5), EXACT, EXACT, torch.float32).ok
    assert not three_way(off_by(1.1 * eps / 8 * 5), EXACT, EXACT, torch.float32).ok
    assert three_way(off_by(1.1 * eps / 8 * 5), EXACT, EXACT, torch.bfloat16).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_never_ok(value):
    ours = torch.tensor([value, 4.0])
    assert not three_way(ours, off_by(1.0), EXACT, torch.float32).ok
    with pytest.raises(AssertionError, match=r"dW \(torch.float32\): error (nan|inf)"):
        assert_three_way("dW", ours, off_by(1.0), EXACT, torch.float32)


def test_zero_and_empty_results():
    zero = torch.zeros(3, dtype=torch.float64)
    assert three_way(zero, zero, zero, torch.float32).share == 0
    assert three_way(zero + 1e-30, zero, zero, torch.float32).share == math.inf
    assert three_way(zero[:0], zero[:0], zero[:0], torch.float32).ok


def test_shapes_and_the_exact_dtype_are_checked():
    with pytest.raises(ValueError, match="shapes differ"):
        three_way(EXACT[:1], EXACT, EXACT, torch.float32)
    with pytest.raises(ValueError, match="exact must be float64"):
        three_way(EXACT, EXACT, EXACT.float(), torch.float32)


def test_relative_error():
    assert relative_error(off_by(0.5), EXACT) == pytest.approx(0.1)
    assert relative_error(EXACT.float(), EXACT) == 0
    assert relative_error(EXACT, 0 * EXACT) == math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_may_be_off_by_a_rounding_for_each_addition(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    ours, magnitudes = torch.full((2, 2), 3.0, dtype=dtype), torch.full((2, 2), 500.0, dtype=torch.float64)
    bound = 16 * unit_roundoff(wide) * 500
    if dtype != wide:
        bound += unit_roundoff(dtype) * 3
    near, far = ours.double().clone(), ours.double().clone()
    near[1, 0] += 0.9 * bound
    far[1, 0] += 1.1 * bound
    assert_sums(ours, near, magnitudes, 10)
    with pytest.raises(AssertionError, match=r"1 of 4 elements are wrong, first \[1, 0\]: 3 instead of 3"):
        assert_sums(ours, far, magnitudes, 10)
    with pytest.raises(AssertionError, match=r"the shape is \[2\] instead of \[2, 2\]"):
        assert_sums(ours[0], near, magnitudes, 10)
    ours[1, 0] = math.nan
    with pytest.raises(AssertionError, match="nan instead of 3"):
        assert_sums(ours, near, magnitudes, 10)
