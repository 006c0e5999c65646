"""The extension's CUDA kernels as they are installed: registers, stack frames and spills, read from the library itself.

That nvcc refused them, or that the library is older than its sources, is a failure.
ptxas writes what it allocated into the machine code, where cuobjdump finds it in no time; a compilation for the tests
would take as long as the build and show another compilation's figures. Spilled registers are in the stack frame, and
read and written by LDL and STL.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from fastres.kernels import projection


class Kernel(NamedTuple):
    """What ptxas allocated: registers of a thread, bytes of the stack frame and of other local memory."""

    registers: int
    stack: int
    local: int


def cuobjdump() -> str:
    """NVIDIA's disassembler, of Triton's package or of the CUDA toolkit; without one the test is skipped."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec else []
    if shutil.which("nvcc"):
        folders.append(Path(shutil.which("nvcc")).resolve().parent)
    found = next(filter(None, (shutil.which("cuobjdump", path=path) for path in (*folders, None))), None)
    if found is None:
        pytest.skip("no cuobjdump: install triton or the CUDA toolkit's")
    return found


def allocated(binary: Path) -> dict[str, dict[str, Kernel]]:
    """Of each architecture in a library or cubin ("sm_80") the kernels by name."""
    said = subprocess.run([cuobjdump(), "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    architectures: dict[str, dict[str, Kernel]] = {}
    for code in re.split(r"^Fatbin elf code:|^Elf code", said, flags=re.MULTILINE):
        kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", code)
        if kernels:
            architecture = re.search(r"^arch = (\w+)", code, re.MULTILINE)
            of_this = architectures.setdefault(architecture[1] if architecture else "", {})
            of_this.update({name: Kernel(*map(int, figures)) for name, *figures in kernels})
    return architectures


def spills(binary: Path, architecture: str) -> list[str]:
    """Instructions that read or write local memory."""
    command = [cuobjdump(), "-sass", "-arch", architecture, binary]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\b(?:LDG|STG)\b", said), f"nothing was disassembled for {architecture}"
    return re.findall(r"\b(?:LDL|STL)\b.*", said)


@pytest.fixture(scope="module")
def library() -> Path:
    build = projection.build_outcome()
    reason = build.get("reason", "it was not installed") or build["cuda"]
    if reason is not None:
        refused = " failed: " in reason  # setup.py's words for a compiler that is there
        (pytest.fail if refused else pytest.skip)(f"the extension has no CUDA kernels: {reason}")
    library = Path(projection.__file__).with_name(build["library"])
    sources = [path for path in library.parent.rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    newer = [path.name for path in sources if path.stat().st_mtime > library.stat().st_mtime]
    assert not newer, f"{', '.join(newer)} changed since the extension was built: python setup.py build_ext --inplace"
    return library


@pytest.fixture(scope="module")
def kernels(library) -> dict[str, dict[str, Kernel]]:
    return allocated(library)


def test_no_kernel_has_a_stack_frame(kernels):
    lines = [(arch, name, kernel) for arch, of_arch in kernels.items() for name, kernel in of_arch.items()]
    assert lines and [line for line in lines if line[2].stack or line[2].local] == []


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_no_kernel_spills(library, kernels, architecture, all_parts):
    if architecture not in kernels:
        pytest.skip(f"the extension is built for {', '.join(kernels)}")
    if architecture == "sm_100" and not all_parts:
        pytest.skip("sm_100 is disassembled with --all-parts only")
    assert spills(library, architecture) == []


def test_every_architecture_has_all_kernels_and_hoppers_its_own(kernels):
    built = {name for name in projection.build_outcome()["cuda_architectures"] if not name.endswith("-virtual")}
    assert {f"sm_{name.removesuffix('-real')}" for name in built} | {"sm_90a"} == set(kernels)
    of_hopper = {name for of_arch in kernels.values() for name in of_arch if "6hopper" in name}
    assert of_hopper and of_hopper <= set(kernels["sm_90a"])
    portable = [set(kernels[arch]) - of_hopper for arch in kernels if arch != "sm_90a" or "90a-real" in built]
    assert portable[0] and all(names == portable[0] for names in portable)
    for dtype in ("8bfloat16", "7float16"):
        assert {dtype in name for name in portable[0]} == {True, False}, "a kernel for no dtype, or for all"


# The test itself


SPILLING = """
__global__ void __launch_bounds__(1024) spills(float* p) {
  float values[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) values[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) p[i * 1024 + (threadIdx.x ^ 1)] = values[i] * values[(i * 7) % 200];
}
__global__ void does_not(float* p) { p[threadIdx.x] *= 2; }
"""


def test_a_planted_spill_is_seen(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    source = tmp_path / "planted.cu"
    source.write_text(SPILLING)
    binary = source.with_suffix(".cubin")
    subprocess.run(["nvcc", "-arch=sm_80", "-cubin", "-o", binary, source], check=True)
    (kernels,) = allocated(binary).values()
    stacks = {re.sub(r"^_Z\d+|Pf$", "", name): kernel.stack for name, kernel in kernels.items()}
    assert stacks.keys() == {"spills", "does_not"}
    assert stacks["spills"] > 0 and stacks["does_not"] == 0
    assert spills(binary, "sm_80")
