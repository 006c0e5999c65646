"""What sdist, wheel and the build of the extension make, on a copy of the tree; offline, without build isolation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import fastres
from fastres.kernels import projection

ROOT = Path(__file__).resolve().parent.parent
TORCH_HIDDEN = "import sys; sys.modules['torch'] = None; "


def build(hook: str, source: Path, folder: Path, prelude: str = "", **environment: str):
    """Run one hook of setuptools' build backend; returns the archive's path, or fails with its output."""
    done = attempt(hook, source, folder, prelude, **environment)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def attempt(hook: str, source: Path, folder: Path, prelude: str = "", **environment: str):
    code = f"{prelude}from setuptools import build_meta; print(build_meta.{hook}({str(folder)!r}))"
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "FASTRES_BUILD_EXT", "MAX_JOBS")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=inherited | environment, capture_output=True, text=True
    )


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
    native = {str(p.relative_to(source)) for p in (source / "kernels").rglob("*") if p.suffix in (".cpp", ".h", ".cu")}
    assert len(native) >= 3
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
    wheel = build("build_wheel", source, tmp_path, prelude, **environment)
    assert wheel.name == "fastres-0.1.0-py3-none-any.whl"
    names, outcome, description = contents(wheel)
    assert not outcome["built"] and reason in outcome["reason"] and outcome["library"] is None
    assert "Root-Is-Purelib: true" in description
    code = {name for name in names if ".dist-info/" not in name and not name.endswith(".json")}
    assert code == modules(source)


def test_wanted_extension_that_cannot_be_built_is_an_error(source, tmp_path):
    done = attempt("build_wheel", source, tmp_path, FASTRES_BUILD_EXT="1", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "the projection extension was not built: the C++ compiler CXX=/nonexistent/c++ was not found" in done.stderr


def test_unknown_wish_is_an_error(source, tmp_path):
    done = attempt("build_wheel", source, tmp_path, FASTRES_BUILD_EXT="yes")
    assert done.returncode != 0 and "FASTRES_BUILD_EXT must be 0, 1 or unset, is 'yes'" in done.stderr


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
    wheel = build("build_wheel", source, tmp_path, FASTRES_BUILD_EXT="1")
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none") and platform != "any"
    names, outcome, description = contents(wheel)
    library = f"fastres/kernels/projection/{outcome['library']}"
    assert "Root-Is-Purelib: false" in description
    assert outcome["built"] and outcome["reason"] is None and outcome["compiler"]
    assert outcome["torch"] == importlib.metadata.version("torch") and outcome["cuda_architectures"] == []
    code = {name for name in names if ".dist-info/" not in name and not name.endswith(".json")}
    assert code == modules(source) | {library}

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        binary = archive.read(library)
    paths = [path for path in (source, Path(torch.__file__).parent) if str(path).encode() in binary]
    assert not paths, "paths of the building machine are in the library"
    program = (
        "import torch, fastres.kernels.projection as p; print(p.__file__, p.available()); "
        "print(p.projection_wgrad(torch.ones(1, 1, 1, 2), torch.ones(1, 2, 2, 3), 2).sum().item())"
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
