import math

import pytest

from fastres.train.schedule import Schedule


def test_the_warm_up_climbs_in_equal_steps_and_ends_at_the_peak():
    schedule = Schedule("cosine", 0.8, steps=100, warmup=4)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_the_cosine_falls_from_the_peak_to_near_zero():
    schedule = Schedule("cosine", 0.4, steps=110, warmup=10)
    assert schedule(10) == 0.4
    assert schedule(35) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule(60) == pytest.approx(0.2)
    assert 0 < schedule(109) < 0.4 * 3e-4
    rates = [schedule(step) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


def test_steps_multiply_by_gamma_at_each_milestone():
    schedule = Schedule("step", 1.0, steps=100, milestones=(0.5, 0.75), gamma=0.1)
    assert [schedule(step) for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_run_that_is_all_warm_up_never_divides_by_zero():
    schedule = Schedule("cosine", 1.0, steps=3, warmup=3)
    assert [schedule(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
