"""The run on a GPU machine, with pieces that need no GPU."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres.measure import results
from fastres.measure.results import Results, Roofline, Row

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def piece(gpu, name, code, share=1.0):
    return gpu.Piece(name, ("-c", code), share)


def test_a_failing_piece_does_not_stop_the_rest(gpu, tmp_path, capsys):
    pieces = [
        piece(gpu, "first", "print('before'); raise SystemExit(3)"),
        piece(gpu, "second", "print('still here')"),
    ]
    first, second = gpu.run(pieces, 600, tmp_path)
    assert (first.result, first.what) == ("FAILED", "exit code 3") and second.result == "ok"
    assert "still here" in (tmp_path / "log.txt").read_text()
    out = capsys.readouterr().out
    assert "before" in out and "still here" not in out


def test_a_piece_that_runs_out_of_its_time_is_interrupted_and_keeps_what_it_wrote(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    code = (
        "import signal, time\n"
        "try:\n    signal.pause()\n"
        "except KeyboardInterrupt:\n    open({file!r}, 'w').write('saved')"
    ).format(file=str(tmp_path / "saved"))
    (outcome,) = gpu.run([piece(gpu, "endless", code)], gpu.REPORT_SECONDS + 6, tmp_path)
    assert (outcome.result, outcome.what) == ("FAILED", "stopped after its 6 s")
    assert (tmp_path / "saved").read_text() == "saved"


def test_what_does_not_fit_is_skipped_and_said(gpu, tmp_path, capsys):
    times = iter([0.0, 485.0])
    (outcome,) = gpu.run([piece(gpu, "late", "pass")], 530, tmp_path, clock=lambda: next(times))
    assert (outcome.result, outcome.what) == ("skipped", "10 s were left")
    assert "late: skipped" in capsys.readouterr().out


def test_unused_time_goes_to_the_pieces_behind(gpu, tmp_path):
    echo = "import sys; print('seconds', sys.argv[1])"
    pieces = [gpu.Piece("a", ("-c", echo, "{seconds}"), 1), gpu.Piece("b", ("-c", echo, "{seconds}"), 1)]
    gpu.run(pieces, 600 + gpu.REPORT_SECONDS, tmp_path, clock=lambda: 0.0)
    given = [line.split()[1] for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("seconds")]
    assert given == [str(300 - gpu.GRACE_SECONDS), str(600 - gpu.GRACE_SECONDS)]


def test_a_small_share_is_no_reason_to_skip(gpu, tmp_path):
    pieces = [piece(gpu, "small", "pass", 0.01), piece(gpu, "large", "pass", 1.0)]
    assert [outcome.result for outcome in gpu.run(pieces, 120, tmp_path)] == ["ok", "ok"]


def test_the_pieces_exist(gpu):
    for wanted in gpu.PIECES:
        for part in wanted.command:
            if part.startswith(("benchmarks/", "tests")):
                assert (ROOT / part).exists(), part


def test_the_tables_and_the_report_come_last(gpu, tmp_path, capsys):
    rows = [
        Row("models", "resnet50", "step", variant, (8, 3, 64, 64), "float32", 8, seconds=seconds, samples=3)
        for variant, seconds in (("fastres", 0.5), ("eager channels_last", 1.0))
    ]
    results.write(tmp_path / results.FILE_NAME, Results({"device": "none"}, Roofline(1e9, {"float32": 1e9}), rows))
    gpu._summarise(tmp_path, [gpu.Outcome("models", "ok", 3.0)])
    out = capsys.readouterr().out
    assert out.index("resnet50") < out.index("report.md") < out.index("make gpu")
    assert (tmp_path / "report.md").exists()


def test_names_of_pieces(gpu):
    assert gpu._parser().parse_args(["--only", "kernels,models"]).only == ["kernels", "models"]
    with pytest.raises(SystemExit):
        gpu._parser().parse_args(["--only", "kernel"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "sees no CUDA device; make test" in done.stdout


def test_an_environment_made_from_another_has_its_packages(tmp_path):
    """A GPU machine's Python is often a virtual environment itself; nothing may be downloaded there."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    outer, inner = tmp_path / "outer", tmp_path / "source" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", outer], check=True)
    site = Path(torch.__file__).parents[1]
    (packages,) = outer.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(f"import site; site.addsitedir({str(site)!r})")
    done = subprocess.run(
        ["make", ".venv/installed", f"PYTHON={outer}/bin/python"],
        cwd=tmp_path / "source",
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "FASTRES_BUILD_EXT": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "downloading nothing" in done.stdout
    code = "import fastres.kernels, torch; print(fastres.kernels.__file__)"
    command = [inner / "bin" / "python", "-c", code]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).parent == tmp_path / "source" / "kernels"
