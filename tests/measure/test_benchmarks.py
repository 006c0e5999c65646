"""`pytest benchmarks/` as people call it, on the smallest selections."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.measure import results

ROOT = Path(__file__).parents[2]
SMALL = ("benchmarks/kernels/test_batch_norm.py", "-k", "bn_act and identity", "--batch", "1")

WRONG = """
from fastres.kernels import library

right = library.bn_act
library.bn_act = lambda *args, **kwargs: right(*args, **kwargs) * 1.01
"""
INTERRUPTED = """
def pytest_runtest_setup(item):
    if "projected" in item.name:
        raise KeyboardInterrupt
"""


@pytest.fixture
def bench(tmp_path):
    """Run `pytest` with these arguments, on the CPU, into `tmp_path / "out"`; `plugin` is loaded with it."""

    def run(*arguments, plugin=None):
        options = ["--device", "cpu", "--out", str(tmp_path / "out"), "-p", "no:cacheprovider"]
        if plugin:
            (tmp_path / "planted.py").write_text(plugin)
            options += ["-p", "planted"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return run


def rows(folder):
    return {row.variant: row for row in results.read(folder).rows}


def test_a_run_writes_results_and_a_report_and_prints_the_table_last(bench, tmp_path):
    done = bench(*SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.read(tmp_path / "out")
    assert {row.variant for row in found.rows} == {"fastres library", "eager"}
    assert all(row.seconds > 0 and row.shape == (1, 14, 14, 1024) for row in found.rows)
    assert found.roofline.copy > 0 and set(found.roofline.gemm) == {"float32"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "bn_act, shortcut identity, ReLU" in report
    assert list((tmp_path / "out").glob("*.png"))
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == f"report: {tmp_path / 'out' / 'report.md'}"
    assert done.stdout.rindex("1 passed") < done.stdout.rindex("fastres library")


def test_a_planted_wrong_kernel_has_no_speed_and_fails_the_run(bench, tmp_path):
    done = bench(*SMALL, plugin=WRONG)
    assert done.returncode == 1
    found = rows(tmp_path / "out")
    assert found["fastres library"].seconds is None
    assert found["fastres library"].refused.startswith("wrong results: out: error")
    assert found["eager"].seconds > 0
    assert "1 failed" in done.stdout and "fastres library: wrong results: out: error" in done.stdout
    assert "refused" in done.stdout[done.stdout.rindex("1 failed") :]


def test_an_interrupted_run_keeps_what_it_has_measured(bench, tmp_path):
    selection = SMALL[:2] + ("bn_act",) + SMALL[3:]
    done = bench(*selection, plugin=INTERRUPTED)
    assert done.returncode == 2
    assert {row.name for row in results.read(tmp_path / "out").rows} == {
        "bn_act, shortcut none, ReLU",
        "bn_act, shortcut identity, ReLU",
    }
    assert (tmp_path / "out" / "report.md").exists()


def test_what_the_time_budget_has_no_room_for_is_skipped_and_said(bench, tmp_path):
    done = bench(*SMALL, "--time-budget", "0")
    assert done.returncode == 0 and "1 skipped" in done.stdout
    found = results.read(tmp_path / "out")
    assert found.rows == [] and len(found.skipped) == 1
    assert found.skipped[0].endswith("no time left") and f"skipped: {found.skipped[0]}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", "2"), "leave -n out"),
        (("--device", "mars"), "--device mars is not known; give cpu, cuda or cuda:N"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--dtype", "fp16"), "--dtype fp16 needs a GPU; give bf16 or fp32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_in_the_options_is_one_line(bench, tmp_path, arguments, message):
    if arguments[0] == "-n":
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = bench(*SMALL, *arguments)
    assert done.returncode == 4
    assert message in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_the_levels_differ_and_dtypes_and_batches_can_be_given(bench):
    counts = {}
    for level in ("core", "full"):
        done = bench("benchmarks", "--collect-only", "-q", "--level", level)
        counts[level] = done.stdout.count("::test_")
    assert 0 < counts["core"] < counts["full"]
    done = bench("benchmarks/models", "--collect-only", "-q", "--dtype", "bf16", "--dtype", "fp32", "--batch", "3")
    assert "[bf16-batch3-" in done.stdout and "[fp32-batch3-" in done.stdout and "batch8" not in done.stdout
