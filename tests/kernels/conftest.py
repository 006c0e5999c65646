"""Where Triton's kernels run in these tests: on the GPU if there is one, else interpreted on the CPU."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastres import cases, inspection, static_checks
from fastres.kernels import reference
from fastres.numerics import assert_three_way


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On a CUDA machine most of this folder runs on the device, so `-m gpu` chooses it."""
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents and "device" in item.fixturenames:
                item.add_marker(pytest.mark.gpu)


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


@pytest.fixture
def launched(triton_kernels, monkeypatch):
    """A list of what is launched meanwhile: the kernel's name and its configuration."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches = []

    def noting(run):
        def noted(kernel, *args, **kwargs):
            launches.append((kernel.__name__, numbers(static_checks.configuration(kernel, *args, **kwargs))))
            return run(kernel, *args, **kwargs)

        return noted

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", noting(kind.run))
    return launches


def numbers(configuration: dict[str, object]) -> dict[str, object]:
    """A configuration without dtypes: float16 is interpreted in bfloat16's place."""
    return {name: value for name, value in configuration.items() if not isinstance(value, str)}


@pytest.fixture
def check_configuration(compiled, compare, poisoned, launched, monkeypatch):
    """`check_configuration(family, wanted, bounds)`: what a request launches compiles without a fault for every part,
    and computes what the reference defines.

    The second on sizes that the interpreter bears, in the very configurations that are compiled; those of another part
    too than the GPU's that there may be. `bounds` as in `compare`.
    """
    from fastres.kernels.triton import _common, _gemm

    def check(family, wanted, bounds=None):
        dtype = getattr(torch, wanted.dtype)
        alike = {
            (request, part): rows
            for (request, part), rows in compiled(family).items()
            if (request.case, request.sizes, request.tile) == (wanted.case, wanted.sizes, wanted.tile)
            and getattr(torch, request.dtype).itemsize == dtype.itemsize
        }
        failures = [
            (inspected.figures.part, str(inspected.request), inspected.figures.kernel, inspected.failures)
            for inspected in inspection.inspect(alike)
            if inspected.failures
        ]
        assert failures == []
        if dtype == torch.bfloat16 and not torch.cuda.is_available():
            dtype = torch.float16  # The interpreter computes bfloat16 wrongly.
        monkeypatch.setattr(_gemm, "PREFERRED", wanted.tile)
        run = []
        for (_, part), rows in alike.items():
            configurations = [(row.kernel, numbers(row.configuration)) for row in rows]
            assert configurations
            if configurations in run:
                continue
            run.append(configurations)
            launched.clear()
            monkeypatch.setattr(_common, "PART_WITHOUT_GPU", part)
            monkeypatch.setattr(_common, "_part_of_gpu", lambda index, part=part: part)
            compare(cases.BY_NAME[wanted.case], dtype, dict(wanted.sizes) | cases.BY_NAME[wanted.case].small, bounds)
            assert launched == configurations

    return check
