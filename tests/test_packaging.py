"""What sdist, wheel and the build of the extension make, on a copy of the tree; offline, without build isolation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
import yaml

import fastres
from fastres import info
from fastres.kernels import projection

ROOT = Path(__file__).resolve().parent.parent
TORCH_HIDDEN = "import sys; sys.modules['torch'] = None; "


def build(hook: str, source: Path, folder: Path, prelude: str = "", **environment: str):
    """Run one hook of setuptools' build backend; returns the archive's path, or fails with its output."""
    done = attempt(hook, source, folder, prelude, **environment)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def attempt(hook: str, source: Path, folder: Path, prelude: str = "", **environment: str):
    """As `build`; without the CUDA kernels unless the environment says otherwise, as they take a minute."""
    code = f"{prelude}from setuptools import build_meta; print(build_meta.{hook}({str(folder)!r}))"
    environment = inherited() | {"FASTRES_BUILD_CUDA": "0"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)


def inherited() -> dict[str, str]:
    """The environment without what a build reads of it."""
    read = ("CXX", "CUDACXX", "CUDAARCHS", "FASTRES_BUILD_EXT", "FASTRES_BUILD_CUDA", "MAX_JOBS")
    return {name: value for name, value in os.environ.items() if name not in read}


@pytest.fixture
def source(tmp_path):
    """A copy of the tree, with leftovers of an older build in place."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    package = tmp_path / "source" / "kernels" / "projection"
    (package / "libfastres_projection.so").write_text("stale")
    (package / "_build.json").write_text("stale")
    return tmp_path / "source"


def modules(source: Path) -> set[str]:
    found = {p.relative_to(source) for folder in ("fastres", "kernels") for p in (source / folder).rglob("*.py")}
    return {str(Path("fastres", p) if p.parts[0] == "kernels" else p) for p in found}


def contents(wheel: Path) -> tuple[set[str], dict, str]:
    """Names in a wheel, the build's outcome and the text of WHEEL."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        outcome = json.loads(archive.read("fastres/kernels/projection/_build.json"))
        return names, outcome, archive.read("fastres-0.1.0.dist-info/WHEEL").decode()


def test_sdist_holds_sources_and_tests_and_no_build_products(source, tmp_path):
    sdist = build("build_sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {
        str(p.relative_to(source))
        for folder in ("kernels", "tests")
        for p in (source / folder).rglob("*")
        if p.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    assert {"kernels/projection/arguments.h", "kernels/projection/cuda/device.cuh"} <= native
    wanted = {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "constraints.txt", "constraints-cpu.txt"}
    wanted |= {
        "setup.py",
        "kernels/projection/__init__.py",
        "tests/test_packaging.py",
        "tests/kernels/test_projection.py",
    }
    assert native | wanted <= names
    assert not {name for name in names if name.endswith((".so", "_build.json", ".pyc"))}


@pytest.mark.parametrize(
    ("prelude", "environment", "reason"),
    [
        ("", {"FASTRES_BUILD_EXT": "0"}, "FASTRES_BUILD_EXT=0 was set"),
        ("", {"CXX": "/nonexistent/c++"}, "the C++ compiler CXX=/nonexistent/c++ was not found"),
        (TORCH_HIDDEN, {}, "torch is not visible to the build"),
    ],
    ids=["skipped", "no compiler", "torch hidden"],
)
def test_wheel_without_the_extension_is_for_any_platform_and_says_why(source, tmp_path, prelude, environment, reason):
    (source / "fastres" / "tuned" / "planted.json").write_text("{}")
    wheel = build("build_wheel", source, tmp_path, prelude, **environment)
    assert wheel.name == "fastres-0.1.0-py3-none-any.whl"
    names, outcome, description = contents(wheel)
    assert not outcome["built"] and reason in outcome["reason"] and outcome["library"] is None
    assert outcome["cuda"] == "the extension is not built" and outcome["cuda_architectures"] == []
    assert "Root-Is-Purelib: true" in description
    code = {name for name in names if ".dist-info/" not in name and not name.endswith(".json")}
    assert code == modules(source)
    assert "fastres/tuned/planted.json" in names, "measured tables are no code, and belong into the wheel"


def test_wanted_extension_that_cannot_be_built_is_an_error(source, tmp_path):
    done = attempt("build_wheel", source, tmp_path, FASTRES_BUILD_EXT="1", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "the projection extension was not built: the C++ compiler CXX=/nonexistent/c++ was not found" in done.stderr


@pytest.mark.parametrize("variable", ["FASTRES_BUILD_EXT", "FASTRES_BUILD_CUDA"])
def test_unknown_wish_is_an_error(source, tmp_path, variable):
    done = attempt("build_wheel", source, tmp_path, **{variable: "yes"})
    assert done.returncode != 0 and f"{variable} must be 0, 1 or unset, is 'yes'" in done.stderr


def test_failed_compilation_gives_the_compilers_words(source, tmp_path):
    if projection.available() is not None:
        pytest.skip(projection.available())
    (source / "kernels" / "projection" / "registration.cpp").write_text('#error "planted"\n')
    names, outcome, _ = contents(build("build_wheel", source, tmp_path))
    assert outcome["reason"].startswith("compilation failed: ") and "planted" in outcome["reason"]
    assert not {name for name in names if name.endswith(".so")}


@pytest.mark.slow
def test_wheel_with_the_extension_is_for_this_platform_and_any_python(source, tmp_path):
    if projection.available() is not None:
        pytest.skip(projection.available())
    old = fake_nvcc(tmp_path, "11.8.89")
    wheel = build("build_wheel", source, tmp_path, FASTRES_BUILD_EXT="1", FASTRES_BUILD_CUDA="", CUDACXX=str(old))
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none") and platform != "any"
    names, outcome, description = contents(wheel)
    library = f"fastres/kernels/projection/{outcome['library']}"
    assert "Root-Is-Purelib: false" in description
    assert outcome["built"] and outcome["reason"] is None and outcome["compiler"]
    assert outcome["torch"] == importlib.metadata.version("torch") and outcome["cuda_architectures"] == []
    assert outcome["cuda"] == f"nvcc 11.8.89 ({old}) is too old: 12.8 or newer is needed" and outcome["nvcc"] is None
    code = {name for name in names if ".dist-info/" not in name and not name.endswith(".json")}
    assert code == modules(source) | {library}

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        binary = archive.read(library)
    paths = [path for path in (source, Path(torch.__file__).parent) if str(path).encode() in binary]
    assert not paths, "paths of the building machine are in the library"
    program = (
        "import torch, fastres.kernels.projection as p; print(p.__file__, p.available()); "
        "print(p.projection_wgrad(torch.ones(1, 1, 1, 2), torch.ones(1, 2, 2, 3), 2)[0].sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "installed/fastres/kernels/projection/__init__.py"), "None", "6.0"]


# The CUDA kernels, in CMake's configuration and in what setup.py makes of it


def fake_nvcc(folder: Path, version: str | None) -> Path:
    """An nvcc that tells a version and compiles nothing."""
    path = folder / "nvcc"
    answer = f"Cuda compilation tools, release 1.0, V{version}" if version else ""
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def configured(folder: Path, *options: str, **environment: str) -> dict | str:
    """What CMake writes for setup.py, or what it says when it fails."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", *options]
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    done = subprocess.run(command, env=inherited() | environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    return json.loads((folder / "build" / "fastres_projection.json").read_text())


def path_without_nvcc() -> str:
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())


@pytest.fixture
def needs_compiler():
    if projection.available() is not None:
        pytest.skip(projection.available())


@pytest.mark.usefixtures("needs_compiler")
def test_without_nvcc_the_cpu_part_is_built_and_the_reason_given(tmp_path):
    path = path_without_nvcc()
    if any(shutil.which(tool, path=path) is None for tool in ("cmake", "ninja", "c++")):
        pytest.skip("the build tools stand in nvcc's folder")
    made = configured(tmp_path, PATH=path)
    assert made["cuda"] == "nvcc was not found: put it on PATH or set CUDACXX"
    assert made["cuda_architectures"] == [] and made["nvcc"] is None


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.parametrize(
    ("version", "environment", "reason"),
    [
        ("12.0.76", {}, "nvcc 12.0.76 (NVCC) is too old: 12.8 or newer is needed"),
        (None, {}, "NVCC does not tell its version: set CUDACXX to an nvcc"),
        (
            "99.0.1",
            {},
            "nvcc 99.0.1 (NVCC) cannot compile an empty program for 80-real, 90a-real, 100-real",
        ),
        ("99.0.1", {"CUDAARCHS": "80-real"}, "nvcc 99.0.1 (NVCC) cannot compile an empty program for 80-real"),
        ("99.0.1", {"CUDAARCHS": "90a-real;75"}, "CUDAARCHS has 75: the kernels need numbers of 80 and above"),
        ("99.0.1", {"CUDAARCHS": "native"}, "CUDAARCHS has native: the kernels need numbers of 80 and above"),
        ("99.0.1", {"CUDACXX": "/nonexistent/nvcc"}, "/nonexistent/nvcc was not found: put it on PATH or set CUDACXX"),
        ("99.0.1", {"FASTRES_BUILD_CUDA": "0"}, "FASTRES_BUILD_CUDA=0 was set"),
    ],
)
def test_an_nvcc_that_does_not_serve_is_left_alone(tmp_path, version, environment, reason):
    nvcc = fake_nvcc(tmp_path, version)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PATH", os.defpath)])
    assert configured(tmp_path, PATH=path, **environment)["cuda"].startswith(reason.replace("NVCC", str(nvcc)))


@pytest.mark.usefixtures("needs_compiler")
def test_wanted_cuda_kernels_that_cannot_be_built_are_an_error(tmp_path):
    nvcc = fake_nvcc(tmp_path, "11.8.89")
    said = " ".join(configured(tmp_path, "-DFASTRES_BUILD_CUDA=1", CUDACXX=str(nvcc)).split())
    assert "error: FASTRES_BUILD_CUDA=1 was set, but nvcc 11.8.89" in said


@pytest.mark.usefixtures("needs_compiler")
def test_the_default_architectures_and_nvccs_version_are_written_down(tmp_path):
    if not projection.build_outcome()["nvcc"] or shutil.which("nvcc") is None:
        pytest.skip(f"the extension has no CUDA kernels: {projection.build_outcome()['cuda']}")
    made = configured(tmp_path)
    assert made["cuda"] is None and made["cuda_architectures"] == ["80-real", "90a-real", "100-real", "100-virtual"]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    assert f"V{made['nvcc']}" in version


@pytest.fixture
def building(monkeypatch, tmp_path):
    """The module setup.py, without its call of setup(); its builds go to a folder of their own."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in set(os.environ) - set(inherited()):
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("fastres_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD_FOLDER", tmp_path / "build")
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path, "13.0.88")))
    return module


MADE = {
    "library": "/build/lib.so",
    "compiler": "GNU",
    "torch": "2.11.0",
    "cuda": None,
    "cuda_architectures": ["80-real"],
    "nvcc": "13.0.88",
}
NO_CUDA = {"cuda_architectures": [], "nvcc": None}


@pytest.mark.parametrize("wish", ["", "1"])
def test_cuda_kernels_that_do_not_compile_leave_the_cpu_part_unless_they_are_wanted(building, monkeypatch, wish):
    asked = []

    def compile_library(cuda):
        asked.append(cuda)
        if cuda != "0":
            raise building.CannotBuild("compilation failed: gram.cu: error")
        return MADE | {"cuda": "FASTRES_BUILD_CUDA=0 was set"} | NO_CUDA

    monkeypatch.setattr(building, "compile_library", compile_library)
    if wish:
        monkeypatch.setenv("FASTRES_BUILD_CUDA", wish)
        with pytest.raises(SystemExit, match="the CUDA kernels were not built: compilation failed: gram.cu: error"):
            building.build_projection()
        assert asked == ["1"]
    else:
        outcome, _ = building.build_projection()
        assert asked == ["", "0"]
        assert outcome["built"] and outcome["cuda"] == "compilation failed: gram.cu: error"


def test_a_failure_without_nvcc_is_no_reason_to_try_again(building, monkeypatch):
    asked = []

    def compile_library(cuda):
        asked.append(cuda)
        raise building.CannotBuild("compilation failed: registration.cpp: error")

    monkeypatch.setattr(building, "compile_library", compile_library)
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    outcome, _ = building.build_projection()
    assert asked == [""] and outcome["reason"] == "compilation failed: registration.cpp: error"


def test_another_nvcc_or_other_architectures_start_the_build_afresh(building, monkeypatch, tmp_path):
    def run_tool(*_):
        (building.BUILD_FOLDER / "fastres_projection.json").write_text("{}")

    monkeypatch.setattr(building, "run_tool", run_tool)
    monkeypatch.setattr(building, "find_tool", lambda name: name)

    def starts_afresh():
        building.BUILD_FOLDER.mkdir(exist_ok=True)
        kept = building.BUILD_FOLDER / "object.o"
        kept.touch()
        building.compile_library("")
        return not kept.exists()

    assert starts_afresh() and not starts_afresh()
    monkeypatch.setenv("CUDAARCHS", "80-real")
    assert starts_afresh() and not starts_afresh()
    fake_nvcc(tmp_path, "13.1.2")
    assert starts_afresh() and not starts_afresh()


def test_an_error_of_cmakes_is_given_with_its_explanation(building):
    said = "-- Configuring\nCMake Error at CMakeLists.txt:9 (add_library):\n  No SOURCES given\n  to target: a\n\nCall"
    assert building.first_error(said) == "CMake Error at CMakeLists.txt:9 (add_library): No SOURCES given to target: a"
    assert building.first_error("[1/2] c++\na.cpp:1: error: planted\n  1 | x") == "a.cpp:1: error: planted"
    assert building.first_error("killed") == ""


@pytest.mark.parametrize("build", [MADE, MADE | NO_CUDA], ids=["with CUDA", "without"])
def test_info_tells_the_cuda_kernels_apart(monkeypatch, capsys, build):
    monkeypatch.setattr(projection, "available", lambda: None)
    monkeypatch.setattr(projection, "cuda_available", lambda: "torch sees no CUDA device")
    monkeypatch.setattr(projection, "build_outcome", lambda: build)
    info.show()
    cpu, cuda = capsys.readouterr().out.split("Projection extension")[1:]
    assert "yes" in cpu and "torch sees no CUDA device" in cuda
    assert ("80-real" in cuda) == ("13.0.88" in cuda) == (build is MADE)


def test_version_is_the_distributions():
    assert fastres.__version__ == importlib.metadata.version("fastres")


def test_the_workflow_tests_the_oldest_and_the_newest_that_are_supported():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    matrix = workflow["jobs"]["cpu"]["strategy"]["matrix"]["include"]
    metadata = importlib.metadata.metadata("fastres")
    oldest_torch = next(r for r in metadata.get_all("Requires-Dist") if r.startswith("torch>=")).removeprefix("torch>=")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:5] == "torch")
    assert min(entry["python"] for entry in matrix) == metadata["Requires-Python"].removeprefix(">=") == "3.10"
    assert {entry["torch"] for entry in matrix} == {f"{oldest_torch}.0", pins["torch"]}
    assert {entry["torchvision"] for entry in matrix if entry["torch"] == pins["torch"]} == {pins["torchvision"]}
    assert [step["run"] for step in workflow["jobs"]["gpu"]["steps"] if "run" in step] == ["make gpu OUT=gpu-results"]
