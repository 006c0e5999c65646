"""Where Triton's kernels run in these tests: on the GPU if there is one, else interpreted on the CPU."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from fastres.kernels import reference


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
