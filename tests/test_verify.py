"""`fastres verify`: what it covers, and that it fails when a kernel or a unit is wrong."""

from __future__ import annotations

import pytest
import torch

from fastres import backends, cases, verify

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Verify two cases of kernels and one unit only."""
    names = ("bn_act, shortcut identity, ReLU", "projection, stride 2")
    monkeypatch.setattr(cases, "BY_NAME", {name: cases.BY_NAME[name] for name in names})
    units = {"Bottleneck": verify._units()["Bottleneck"]}
    monkeypatch.setattr(verify, "_units", lambda: units)


@pytest.fixture
def kernels_only(small, monkeypatch):
    """And no unit: a plan must not remember a kernel that a test has replaced."""
    monkeypatch.setattr(verify, "_units", dict)


def test_every_kernel_of_every_namespace_is_in_some_case():
    covered = {name for case in cases.BY_NAME.values() for name in case.kernels}
    for namespace in ("reference", "library", "projection", "projection.hopper"):
        launchers = set(backends.load(namespace).__all__) - {"available", "cuda_available"}
        assert launchers <= covered, namespace
    assert covered == set(backends.load("reference").__all__)


def test_every_case_calls_the_kernels_that_it_names():
    reference = backends.load("reference")

    class Recorder:
        def __init__(self):
            self.called = set()

        def __getattr__(self, name):
            self.called.add(name)
            return getattr(reference, name)

    for case in cases.BY_NAME.values():
        recorder = Recorder()
        case.run(recorder, case.make(cases.Maker(torch.float32), **case.sizes))
        assert set(case.kernels) <= recorder.called, case.name


def test_rows_name_check_backend_and_dtype(small):
    rows = verify.run(CPU)
    assert [row for row in rows if not row.ok] == []
    found = {(row.name, row.backend, row.dtype) for row in rows}
    expected = {("bn_act, shortcut identity, ReLU", backend) for backend in ("reference", "library")}
    expected |= {("projection, stride 2", backend) for backend in ("reference", "library")}
    if backends.available()["projection"] is None:
        expected.add(("projection, stride 2", "projection"))
    expected |= {("Bottleneck, training", "auto"), ("Bottleneck, eval", "auto")}
    assert found == {(*check, dtype) for check in expected for dtype in (torch.float32, torch.bfloat16)}
    unit = next(row for row in rows if row.name == "Bottleneck, training")
    assert {"output", "gradient of x", "gradient of conv2.weight", "bn3.running_var"} <= unit.results.keys()
    assert all(0 <= row.share <= 1 for row in rows)


def test_passing_checks_exit_with_0(small, capsys):
    assert verify.main() == 0
    out = capsys.readouterr().out
    assert "bn_act, shortcut identity, ReLU" in out and "Bottleneck, training" in out
    assert "FAILED" not in out
    for name, reason in backends.available().items():
        assert (f"not checked: backend {name}: {reason}" in out) == (reason is not None)


@pytest.mark.parametrize("change", [lambda out: out * 1.001, lambda out: out.fill_(float("nan"))], ids=["off", "NaN"])
def test_a_wrong_kernel_fails(change, kernels_only, capsys, monkeypatch):
    library = backends.load("library")
    right = library.bn_act
    monkeypatch.setattr(library, "bn_act", lambda *args, **kwargs: change(right(*args, **kwargs)))
    assert verify.main() == 1
    out = capsys.readouterr().out
    assert "FAILED bn_act, shortcut identity, ReLU, library, cpu, float32: out: error" in out
    assert "bn_act, shortcut identity, ReLU, reference" not in out


def test_a_kernel_that_raises_fails_and_the_others_are_still_checked(kernels_only, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(backends.load("library"), "bn_act", broken)
    rows = verify.run(CPU)
    failed = [row for row in rows if not row.ok]
    assert {(row.name, row.backend) for row in failed} == {("bn_act, shortcut identity, ReLU", "library")}
    assert all(row.error == "RuntimeError: no such luck" for row in failed)
    assert len(rows) > len(failed)


def test_a_unit_that_does_not_run_fused_fails(small, monkeypatch):
    monkeypatch.setattr("fastres.nn.Bottleneck.fused_reason", lambda self: "a test says so")
    units = [row for row in verify.run(CPU) if row.backend == "auto"]
    assert units and all(row.error == "RuntimeError: does not run fused: a test says so" for row in units)


def test_tf32_is_off_meanwhile_and_as_before_afterwards(small, monkeypatch):
    seen = []
    monkeypatch.setattr(verify, "_kernel_rows", lambda device: iter([seen.append(flags())]))
    monkeypatch.setattr(verify, "_unit_rows", lambda device: iter(()))

    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    verify.run(CPU)
    assert seen == [(False, False)] and flags() == before


@pytest.mark.slow
def test_everything_that_can_run_here_passes():
    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    rows = verify.run(device)
    failed = [
        (row, row.error or [f"{n}: {r}" for n, r in row.results.items() if not r.ok]) for row in rows if not row.ok
    ]
    assert [f"{row.name}, {row.backend}, {row.dtype}: {what}" for row, what in failed] == []
