"""An experiment from its variants to its rows."""

import itertools

import pytest
import torch

from fastres.measure import experiment
from fastres.measure.experiment import Experiment, Ready, Variant, Work
from fastres.measure.gate import REFERENCE, Verdict
from fastres.measure.timing import Settings

SETTINGS = Settings(burst=0.0, samples=3, limit=5.0, warmup=0.0, first=1, window=1)
PHASES = "forward", "backward", "step"


def variant(fake_device, forward, backward, verdict=REFERENCE, needs=0.0, **options):
    parts = {
        "forward": lambda: fake_device.work("forward", forward),
        "backward": lambda: fake_device.work("backward", backward),
    }
    return Variant(lambda: Ready(parts, verdict, **options), needs=needs)


@pytest.fixture
def run(fake_device):
    def run(left=1e9, **variants):
        named = {name.replace("_", " "): made for name, made in variants.items()}
        wanted = Experiment("units", "u", PHASES, (2, 3, 4, 4), torch.bfloat16, 2, named, SETTINGS)
        return experiment.run(wanted, fake_device, lambda: left)

    return run


def test_each_phase_and_the_whole_are_rows(fake_device, run):
    ours = variant(
        fake_device,
        1.0,
        2.0,
        Verdict("3 results, worst 40 %"),
        work={"forward": Work(100, 200), "step": Work(300, 600)},
        peak_memory=7,
        saved_bytes=5,
    )
    report = run(fastres=ours, eager_NCHW=variant(fake_device, 2.0, 3.0))
    rows = {(row.variant, row.phase): row for row in report.rows}
    assert list(rows) == [(name, phase) for name in ("fastres", "eager NCHW") for phase in PHASES]
    assert {key: row.seconds for key, row in rows.items()} == {
        ("fastres", "forward"): 1.0,
        ("fastres", "backward"): 2.0,
        ("fastres", "step"): 3.0,
        ("eager NCHW", "forward"): 2.0,
        ("eager NCHW", "backward"): 3.0,
        ("eager NCHW", "step"): 5.0,
    }
    row = rows["fastres", "forward"]
    assert (row.group, row.name, row.shape, row.dtype, row.batch) == ("units", "u", (2, 3, 4, 4), "bfloat16", 2)
    assert (row.bytes, row.flops, row.peak_memory, row.saved_bytes) == (100, 200, 7, 5)
    assert rows["fastres", "backward"].bytes is None and rows["fastres", "step"].flops == 600
    assert row.gate == "3 results, worst 40 %" and row.samples == 3
    assert report.failures == report.skipped == {} and set(report.calls) == {"fastres", "eager NCHW"}


def test_what_the_gate_refuses_is_never_called(fake_device, run):
    refused = Verdict("2 results", "wrong results: out")
    report = run(fastres=variant(fake_device, 1.0, 1.0, refused))
    assert fake_device.log == []
    assert [(row.phase, row.seconds, row.refused) for row in report.rows] == [
        (phase, None, "wrong results: out") for phase in PHASES
    ]
    assert report.failures == {"fastres": "wrong results: out"} and report.calls == {}


def test_a_wrong_baseline_is_a_failure_and_one_that_cannot_run_is_not(fake_device, run):
    def cannot():
        raise RuntimeError("no compiler")

    report = run(
        eager_NCHW=variant(fake_device, 1.0, 1.0, Verdict("", "wrong results: out")),
        compile_default=Variant(cannot),
        fastres=variant(fake_device, 1.0, 1.0),
    )
    assert report.failures == {"eager NCHW": "wrong results: out"}
    refused = {row.variant: row.refused for row in report.rows if row.refused}
    assert refused == {"eager NCHW": "wrong results: out", "compile default": "RuntimeError: no compiler"}
    assert {row.variant for row in report.rows if row.seconds} == {"fastres"}


def test_out_of_memory_while_timing_is_a_refused_row(fake_device, run):
    calls = itertools.count()

    def forward():
        if next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    ours = Variant(lambda: Ready({"forward": forward, "backward": lambda: None}, REFERENCE))
    report = run(fastres=ours, eager_NCHW=variant(fake_device, 1.0, 1.0))
    assert {row.refused for row in report.rows if row.variant == "fastres"} == {"out of memory"}
    assert all(row.seconds for row in report.rows if row.variant == "eager NCHW")
    assert report.failures == {"fastres": "out of memory"}


def test_a_problem_found_after_the_timing_refuses(fake_device, run):
    report = run(fastres=variant(fake_device, 1.0, 1.0, finish=lambda: "the loss became nan"))
    assert {row.refused for row in report.rows} == {"the loss became nan"}
    assert report.failures == {"fastres": "the loss became nan"}


def test_a_compilation_that_does_not_fit_in_the_time_is_skipped(fake_device, run):
    compiled = variant(fake_device, 1.0, 1.0, needs=60.0)
    report = run(left=64.0, fastres=variant(fake_device, 1.0, 1.0), compile_default=compiled)
    assert {row.variant for row in report.rows} == {"fastres"}
    ((what, why),) = report.skipped.items()
    assert what.endswith("compile default")
    assert why == "64 s left, compiling may take 60 s and timing all variants 5 s"
    assert {row.variant for row in run(left=65.0, compile_default=compiled).rows} == {"compile default"}
