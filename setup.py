"""Packages, and the projection extension built by CMake and Ninja where this machine can.

Without torch (pip's build isolation hides it), CMake, Ninja or a C++ compiler the package installs without the
extension, and without an nvcc that can compile them the extension without its CUDA kernels. Either way the outcome is
written to `kernels/projection/_build.json`, where `fastres info` reads it.

Environment: FASTRES_BUILD_EXT=1 makes a failed build an error, 0 skips the build; FASTRES_BUILD_CUDA does the same for
the CUDA kernels; CXX and CUDACXX name the compilers; CUDAARCHS the architectures, as CMake has it; MAX_JOBS the
parallel compile jobs.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import dropwhile, takewhile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_FOLDER = ROOT / "build" / "projection"  # kept between builds: an editable install recompiles what changed
OUTCOME = "_build.json"
MINIMUM_TORCH = (2, 11)  # the first release with the stable ABI that the sources are written for
GIB_PER_JOB = 2  # peak of one compiler process on torch's headers, rounded up


class CannotBuild(Exception):
    """The extension cannot be built; the message is the reason that users read."""


def find_tool(name: str) -> str:
    """Path of a build tool on PATH or beside the running Python, which need not be an activated environment."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise CannotBuild(f"{name} was not found: pip install {name}")
    return tool


def find_compiler() -> str | None:
    """The compiler that CXX names, None where CMake may choose one itself."""
    named = os.environ.get("CXX")
    if named:
        if shutil.which(named.split()[0]) is None:
            raise CannotBuild(f"the C++ compiler CXX={named} was not found")
        return named
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise CannotBuild("no C++ compiler was found: install gcc or clang, or set CXX")
    return None


def nvcc() -> list[str]:
    """Path and version of the nvcc that CMakeLists.txt finds, empty where there is none."""
    named = os.environ.get("CUDACXX") or "nvcc"
    path = shutil.which(named.split()[0])
    if path is None:
        return []
    return [path, subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace").stdout]


def wish(variable: str) -> str:
    """The value of one of our environment variables: 0, 1 or nothing."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0, 1 or unset, is {value!r}")
    return value


def find_torch() -> tuple[str, str]:
    """Folder and version of the installed torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild("torch is not visible to the build: install it, then use pip install --no-build-isolation")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise CannotBuild(f"torch {version} is too old: the extension needs {'.'.join(map(str, MINIMUM_TORCH))}")
    return spec.submodule_search_locations[0], version


def jobs() -> int:
    """Compile jobs: MAX_JOBS, else the cores this process may use, fewer where free memory is short."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, int(available / GIB_PER_JOB)))


def run_tool(step: str, command: list[str]) -> None:
    """Run one build step; its output goes to our stderr only when it fails, as pip shows both as one stream."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise CannotBuild(f"{step} failed: {first_error(done.stdout) or f'exit status {done.returncode}'}")


def first_error(output: str) -> str:
    """The first line with an error; CMake ends its own with a colon and explains it in a paragraph."""
    lines = dropwhile(lambda line: "error" not in line.lower(), map(str.strip, output.splitlines()))
    error = next(lines, "")
    explanation = takewhile(bool, dropwhile(lambda line: not line, lines)) if error.endswith(":") else ()
    return " ".join([error, *explanation])


def compile_library(cuda: str) -> dict:
    """Configure and build; returns what CMake wrote about the library, the keys of OUTCOME but "built" and "reason".

    cuda: as FASTRES_BUILD_CUDA.
    """
    torch_folder, torch_version = find_torch()
    cmake, ninja, compiler = find_tool("cmake"), find_tool("ninja"), find_compiler()
    # CMake keeps the first compilers, architectures and torch it saw: start afresh when one changed.
    key = json.dumps([compiler, torch_folder, torch_version, nvcc(), os.environ.get("CUDAARCHS")])
    key_file = BUILD_FOLDER / "key.json"
    if BUILD_FOLDER.exists() and (not key_file.exists() or key_file.read_text() != key):
        shutil.rmtree(BUILD_FOLDER)
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    key_file.write_text(key)
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD_FOLDER), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DFASTRES_BUILD_CUDA={cuda}"]
    run_tool("CMake's configuration", configure)
    run_tool("compilation", [cmake, "--build", str(BUILD_FOLDER), "--parallel", str(jobs())])
    return json.loads((BUILD_FOLDER / "fastres_projection.json").read_text())


def compile_what_can_be(cuda: str) -> dict:
    """`compile_library`; where that fails and nobody asked for the CUDA kernels, without them."""
    try:
        return compile_library(cuda)
    except CannotBuild as error:
        if cuda or not nvcc():
            raise
        return compile_library("0") | {"cuda": str(error)}


@functools.cache  # a wheel runs build_ext twice
def build_projection() -> tuple[dict, Path | None]:
    """Build the extension once per process: the outcome as it goes into OUTCOME, and the library's path or None."""
    outcome = {"built": False, "reason": None, "library": None, "compiler": None, "torch": None}
    outcome |= {"cuda": "the extension is not built", "cuda_architectures": [], "nvcc": None}
    wanted, wanted_cuda = wish("FASTRES_BUILD_EXT"), wish("FASTRES_BUILD_CUDA")
    library = None
    try:
        if wanted == "0":
            raise CannotBuild("FASTRES_BUILD_EXT=0 was set")
        made = compile_what_can_be(wanted_cuda)
        library = Path(made.pop("library"))
        outcome |= made | {"built": True, "library": library.name}
    except CannotBuild as error:
        outcome["reason"] = str(error)
    print_summary(outcome)
    if wanted == "1" and not outcome["built"]:
        raise SystemExit(f"FASTRES_BUILD_EXT=1, but the projection extension was not built: {outcome['reason']}")
    if wanted_cuda == "1" and outcome["cuda"]:
        reason = outcome["reason"] or outcome["cuda"]
        raise SystemExit(f"FASTRES_BUILD_CUDA=1, but the CUDA kernels were not built: {reason}")
    return outcome, library


def print_summary(outcome: dict) -> None:
    """One block on stderr (pip shows it with -v)."""
    rows = [("projection extension", "built" if outcome["built"] else "not built")]
    if outcome["built"]:
        rows += [("compiler", outcome["compiler"]), ("torch", outcome["torch"]), ("jobs", jobs())]
        cuda = f"{', '.join(outcome['cuda_architectures'])}, by nvcc {outcome['nvcc']}"
        rows += [("CUDA kernels", f"none: {outcome['cuda']}" if outcome["cuda"] else cuda)]
    else:
        rows += [("reason", outcome["reason"]), ("consequence", "fastres runs without it; the other backends serve")]
    print("\n".join(["", "fastres"] + [f"  {name:<21} {value}" for name, value in rows] + [""]), file=sys.stderr)


class BuildExtension(build_ext):
    """build_ext that asks CMake, and delivers the library and OUTCOME into the package."""

    def folder(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return ROOT / "kernels" / "projection" if in_place else Path(self.build_lib, "fastres", "kernels", "projection")

    def run(self) -> None:
        outcome, library = build_projection()
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("libfastres_projection.*"):
            stale.unlink()  # also so that a process that has the old library mapped keeps its own copy
        if library is not None:
            shutil.copy2(library, folder)
        (folder / OUTCOME).write_text(json.dumps(outcome, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        outcome, _ = build_projection()
        names = [OUTCOME] + ([outcome["library"]] if outcome["built"] else [])
        return [str(self.folder() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWheel(bdist_wheel):
    """A wheel is for this platform when it holds the library, and always for any Python 3: there is no Python ABI."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not build_projection()[0]["built"]:
            self.distribution.ext_modules = None
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    package_dir={"fastres.kernels": "kernels"},
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres.kernels",
        *(f"fastres.kernels.{name}" for name in find_packages("kernels")),
    ],
    ext_modules=[Extension("fastres.kernels.projection.libfastres_projection", sources=[])],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": BuildWheel},
)
