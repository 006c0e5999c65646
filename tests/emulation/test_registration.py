"""registration_cuda.cpp on a CPU: beside a torch that pretends to have a GPU, with the emulated kernels.

A pointer passed for another, a missing guard or the wrong stream would otherwise show on a GPU only. The sources are
compiled as they are; `pretended_cuda.cpp` says how. In a process of its own, as the ops' names are taken in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

FOLDER = Path(__file__).parent
SOURCES = [
    emulated.PROJECTION / "registration.cpp",
    emulated.PROJECTION / "registration_cuda.cpp",
    FOLDER / "pretended_cuda.cpp",
]


@pytest.fixture(scope="module")
def library(builder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretended")
    torchs = Path(torch.__file__).parent
    includes = [f"-I{emulated.PROJECTION}", "-isystem", torchs / "include"]
    includes += ["-isystem", torchs / "include" / "torch" / "csrc" / "api" / "include"]
    options = ["-std=c++20", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000", *includes]
    library = folder / "libfastres_projection.so"
    # -Bsymbolic: what it defines of torch's is its own, whatever else the process has loaded.
    linked = ["-shared", "-Wl,-Bsymbolic", torchs / "lib" / "libtorch_cpu.so", "-ldl"]
    subprocess.run([*builder.cxx, *options, *SOURCES, *linked, "-o", library], check=True)
    outcome = {"built": True, "library": library.name, "torch": torch.__version__, "cuda": None}
    (folder / "_build.json").write_text(json.dumps(outcome))
    return library


def test_registration(library, kernels):
    places = {"PRETENDED_LIBRARY": str(library), "EMULATION_LIBRARY": kernels.library._name}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command.append(str(FOLDER / "on_pretended_cuda.py"))
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
