"""The CUDA kernels' sources on the CPU; pytest's importlib mode leaves this folder's modules to be found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulated


@pytest.fixture(scope="session")
def builder(tmp_path_factory, request) -> emulated.Builder:
    cxx = emulated.compiler()
    if cxx is None:
        pytest.skip("no C++20 compiler: set CXX, or install g++ 11 or newer")
    session = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # pytest-xdist: the workers' folders stand side by side
        session = session.parent
    return emulated.Builder(session / "emulation", cxx)


@pytest.fixture(scope="session")
def kernels(builder) -> emulated.Kernels:
    """The kernels of this checkout."""
    return emulated.Kernels(builder.library([*emulated.MACHINE, *emulated.SOURCES]))
