"""Where Triton's kernels run in these tests: on the GPU if there is one, else interpreted on the CPU."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from fastres import cases
from fastres.kernels import reference
from fastres.numerics import assert_three_way


def _cannot_run() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available():
        return None
    release = [tuple(map(int, version(name).split(".")[:2])) for name in ("numpy", "triton")]
    if release[0] >= (2, 4) and release[1] < (3, 7):
        return (
            f"no CUDA, and the interpreter of triton {version('triton')} fails with numpy {version('numpy')} (>= 2.4)"
        )
    return None


@pytest.fixture(scope="session")
def triton_kernels():
    """The module `fastres.kernels.triton`."""
    reason = _cannot_run()
    if reason:
        pytest.skip(reason)
    from fastres.kernels import triton

    return triton


@pytest.fixture(scope="session")
def k(triton_kernels) -> SimpleNamespace:
    """A namespace with Triton's kernels, and the reference's for the rest."""
    return SimpleNamespace(
        **{name: getattr(triton_kernels, name, getattr(reference, name)) for name in reference.__all__}
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)


@pytest.fixture
def poisoned(monkeypatch):
    """New memory is full of NaN (or of the largest integer), so that what a kernel leaves unwritten shows."""

    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def compare(k, device):
    """`compare(case, dtype, sizes, bounds)`: Triton's results of a case against the reference in float64.

    They may be off by twice as much as the reference's in the same dtype. For results that it names, `bounds` gives
    the bounds of each value's error instead, from the inputs in float64: for sums, whose order of additions is the
    kernel's own.
    """

    def check(case, dtype, sizes, bounds=None):
        t = case.make(cases.Maker(dtype, device), **sizes)
        ours, stock = case.run(k, cases.copied(t)), case.run(reference, cases.copied(t))
        exact = case.run(reference, cases.exact_inputs(t))
        assert ours.keys() == exact.keys()
        bounded = {} if bounds is None else bounds(cases.exact_inputs(t))
        for result in exact:
            assert ours[result].dtype == stock[result].dtype
            if result in bounded:
                assert ((ours[result] - exact[result]).abs() <= bounded[result]).all(), result
            else:
                assert_three_way(result, ours[result], stock[result], exact[result], dtype)

    return check
