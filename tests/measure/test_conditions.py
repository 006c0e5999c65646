"""Conditions and roofline of this machine, and of a GPU that nvidia-smi stands in for."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from fastres import info
from fastres.measure import conditions, roofline, timing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_conditions_of_a_cpu():
    found = conditions.gather(CPU)
    assert {"device", "CPU threads", "python", "torch", "date", "settings", "FASTRES_BACKEND"} <= found.keys()
    assert "driver" not in found and "clocks" not in found
    assert "TF32 in matrix products off" in found["settings"]
    assert all(isinstance(text, str) and text for text in found.values())


def test_the_backend_asked_for_is_a_condition(monkeypatch):
    monkeypatch.setenv("FASTRES_BACKEND", "library")
    assert conditions.gather(CPU)["FASTRES_BACKEND"] == "library"
    monkeypatch.delenv("FASTRES_BACKEND")
    assert conditions.gather(CPU)["FASTRES_BACKEND"] == "not set"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    package = tmp_path / "fastres"
    package.mkdir()
    (package / "info.py").write_text("")
    monkeypatch.setattr(info, "__file__", str(package / "info.py"))
    return tmp_path


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_of_the_package_and_says_when_it_was_changed(checkout):
    assert "commit" not in conditions.gather(CPU)
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "one")
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert conditions.gather(CPU)["commit"] == commit
    (checkout / "results.json").write_text("not part of it")
    assert conditions.gather(CPU)["commit"] == commit
    kept = checkout / "benchmarks" / "results" / "results.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "two")
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    kept.write_text("measured again")
    assert conditions.gather(CPU)["commit"] == commit
    (checkout / "fastres" / "info.py").write_text("changed")
    assert conditions.gather(CPU)["commit"] == commit + "-dirty"


@pytest.fixture
def nvidia_smi(monkeypatch):
    """The arguments that nvidia-smi was called with."""
    calls = []

    def run(command, **options):
        calls.append(command)
        text = {"driver_version": "580.1\n", "clocks.sm": "1980\n"}[command[1].split("=")[1]]
        return SimpleNamespace(returncode=0, stdout=text)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-ab"))
    monkeypatch.setattr(conditions.shutil, "which", lambda name: name)
    monkeypatch.setattr(conditions.subprocess, "run", run)
    return calls


def test_driver_and_clock_are_of_the_device_that_is_measured(nvidia_smi):
    assert conditions._driver(GPU) == "580.1"
    assert conditions.clocks(GPU) == "SM 1980 MHz"
    assert all("--id=GPU-1234-ab" in command for command in nvidia_smi)


def test_without_nvidia_smi_there_is_no_driver_and_no_clock(nvidia_smi, monkeypatch):
    monkeypatch.setattr(conditions.shutil, "which", lambda name: None)
    assert conditions._driver(GPU) is None and conditions.clocks(GPU) is None
    assert conditions.clock_note(None, None) is None
    assert conditions.clock_note("SM 1 MHz", None) == "SM 1 MHz"


def test_the_roofline_is_what_this_machine_does(monkeypatch):
    monkeypatch.setattr(roofline, "_CPU", timing.Settings(burst=0.0, samples=2, limit=1.0, warmup=0.0, first=1))
    found = roofline.measure(CPU, [torch.float32, torch.bfloat16], timing.HostClock())
    assert 1e8 < found.copy < 1e13
    assert set(found.gemm) == {"float32", "bfloat16"}
    assert all(1e8 < rate < 1e15 for rate in found.gemm.values())


@pytest.mark.parametrize(("matmul", "cudnn", "used"), [(False, True, True), (True, False, True), (False, False, False)])
def test_float32_products_use_what_convolutions_may_use(matmul, cudnn, used):
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting, on in zip(settings, (matmul, cudnn), strict=True):
            setting.allow_tf32 = on
        with roofline._fastest_float32():
            assert settings[0].allow_tf32 is used
        assert settings[0].allow_tf32 is matmul
    finally:
        for setting, on in zip(settings, before, strict=True):
            setting.allow_tf32 = on
