"""`make gpu`: check, test and measure everything on this machine's GPU, within a time budget, and write one folder.

Each piece is a process of its own: a failure, or a piece that runs out of its time, does not stop the rest. A piece's
time is its share of what is left, so that what one does not use goes to those behind it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastres.measure import report, results
from fastres.train.console import print_table

ROOT = Path(__file__).resolve().parent.parent
REPORT_SECONDS = 35
"""Kept back for the report, and for a last piece that has to be told to stop."""

LEAST_SECONDS = 30
"""What a piece gets at least where so much is left, whatever its share; where less is left it does not start."""

GRACE_SECONDS = 15
"""What a piece has to write its results, before it would be stopped and after it was told to."""

TAIL_LINES = 30


@dataclass(frozen=True)
class Piece:
    """One part of the run. command: arguments of Python; "{out}" and "{seconds}" are filled in. share: of the time.

    "{seconds}" is less than what the piece has, by what starting and a report of its own take.
    """

    name: str
    command: tuple[str, ...]
    share: float


def _benchmarks(name: str, share: float) -> Piece:
    command = ("-m", "pytest", f"benchmarks/{name}", "-q", "--out", "{out}", "--time-budget", "{seconds}")
    return Piece(name, command, share)


# Most of their time goes into compiling kernels, on the CPU.
_IN_PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 else ()

PIECES = (
    Piece("info", ("-m", "fastres", "info"), 0.5),
    Piece("verify", ("-m", "fastres", "verify"), 1.5),
    Piece("tests", ("-m", "pytest", "tests", "-q", "-m", "gpu", *_IN_PARALLEL), 3),
    Piece("sanitizer", ("benchmarks/sanitizer.py",), 1),
    # Before what is timed by the plan that it changes.
    Piece("tune", ("benchmarks/tune.py", "--out", "{out}/tuned", "--time-budget", "{seconds}"), 2),
    _benchmarks("models", 4),
    _benchmarks("units", 1.5),
    _benchmarks("kernels", 1.5),
)
"""In the order of importance: what is wrong before what is slow, whole models before their parts."""


@dataclass(frozen=True)
class Outcome:
    """How a piece ended. result: "ok", "FAILED" or "skipped"; what: why."""

    name: str
    result: str
    seconds: float
    what: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 when a piece failed or did not fit; 2 for wrong arguments or where there is no GPU."""
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no CUDA device; make test and make bench run on a CPU")
        return 2
    out = arguments.out or _default_folder(torch.cuda.get_device_name())
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run([piece for piece in PIECES if piece.name in arguments.only], arguments.budget, out)
    _summarise(out, outcomes)
    return int(any(outcome.result != "ok" for outcome in outcomes))


def run(
    pieces: Sequence[Piece], budget: float, out: Path, clock: Callable[[], float] = time.monotonic
) -> list[Outcome]:
    """Run the pieces within `budget` seconds; what they print goes to `log.txt` in `out`."""
    deadline = clock() + budget - REPORT_SECONDS
    outcomes = []
    with open(out / "log.txt", "a") as log:
        for index, piece in enumerate(pieces):
            left = deadline - clock()
            share = piece.share / sum(other.share for other in pieces[index:])
            seconds = max(left * share, LEAST_SECONDS)
            if left < LEAST_SECONDS:
                outcome = Outcome(piece.name, "skipped", 0, f"{max(0, left):.0f} s were left")
            else:
                outcome = _run_piece(piece, seconds, out, log, clock)
            outcomes.append(outcome)
            print(f"{piece.name}: {outcome.result}, {outcome.seconds:.0f} s {outcome.what}".rstrip(), flush=True)
    return outcomes


def _run_piece(piece: Piece, seconds: float, out: Path, log, clock: Callable[[], float]) -> Outcome:
    values = {"out": out.resolve(), "seconds": round(seconds - GRACE_SECONDS)}
    command = [sys.executable, *(part.format(**values) for part in piece.command)]
    print(f"\n=== {piece.name}: {' '.join(command[1:])}", file=log, flush=True)
    begin, position = clock(), log.tell()
    with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            code = process.wait(seconds)
            what = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            what = f"stopped after its {seconds:.0f} s"
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    if not what:
        return Outcome(piece.name, "ok", clock() - begin)
    log.flush()
    with open(log.name) as written:
        written.seek(position)
        print(*written.read().splitlines()[-TAIL_LINES:], sep="\n", flush=True)
    return Outcome(piece.name, "FAILED", clock() - begin, what)


def _summarise(out: Path, outcomes: Sequence[Outcome]) -> None:
    """The report, and the tables that end the output."""
    if (out / results.FILE_NAME).exists():
        measured = results.read(out)
        report.show(measured)
        print(f"report: {report.write(out, measured)}")
    rows = [[outcome.name, outcome.result, f"{outcome.seconds:.0f} s", outcome.what] for outcome in outcomes]
    print_table(f"make gpu: {out}", ["piece", "result", "time", ""], rows)


def _default_folder(device_name: str) -> Path:
    gpu = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / gpu / datetime.datetime.now().strftime("%Y-%m-%d-%H%M")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for all of it (default: 540)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/GPU/DATE")
    parser.add_argument("--only", type=_names, default=_names(""), metavar="PIECE,...", help="run these pieces only")
    return parser


def _names(text: str) -> list[str]:
    known = [piece.name for piece in PIECES]
    names = text.split(",") if text else known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
