"""Measure on this machine's GPU what the plan chooses by, and write `fastres/tuned/<gpu>.json`.

The plan runs a matrix product by Triton or by the library, whichever is faster for its shapes: as measured, where a
table has them, else as modelled. This times both for every such call of a training step. Tables are committed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fastres import models, tuned
from fastres.cost.traffic import tensors
from fastres.measure import conditions, tuning
from fastres.train.console import counter, print_table
from fastres.train.engine import DTYPES
from fastres.train.options import positive


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 when calls failed; 2 for wrong arguments or where there is no GPU."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"tune: torch {torch.__version__} sees no CUDA device")
        return 2
    end = time.monotonic() + arguments.time_budget
    wanted: dict[str, tuning.Choice] = {}
    try:
        for name in arguments.model:
            shape, model = models.image_shape(name), models.create(name)
            for batch in arguments.batch:
                for dtype in arguments.dtype:
                    wanted |= tuning.choices(model, (batch, *shape), DTYPES[dtype])
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda", torch.cuda.current_device())
    # What counts most first: the budget may not suffice for all.
    ordered = sorted(
        wanted.values(), key=lambda choice: -sum(t.nbytes for t in tensors((choice.call.args, choice.call.kwargs)))
    )
    with counter("calls timed") as progress:
        each = _counted(ordered, progress)
        seconds, failures = tuning.measure(each, device, lambda: end - time.monotonic())
    rows = [[label, *(f"{name} {1e6 * took:.1f}" for name, took in row.items())] for label, row in seconds.items()]
    print_table("Microseconds of one call", ["call", "", ""], rows)
    for label, why in failures.items():
        print(f"not measured: {label}: {why}")
    if skipped := len(wanted) - len(seconds) - len(failures):
        print(f"no time was left for {skipped} of {len(wanted)} calls")
    if seconds:
        facts = conditions.gather(device)
        for folder in filter(None, (tuned.FOLDER, arguments.out)):
            print(f"{len(seconds)} calls: {tuned.write(torch.cuda.get_device_name(device), facts, seconds, folder)}")
    return int(bool(failures))


def _counted(wanted: list[tuning.Choice], progress: Callable[[int, int], None]) -> Iterator[tuning.Choice]:
    for index, choice in enumerate(wanted):
        progress(index, len(wanted))
        yield choice


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/tune.py",
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/tune.py --model resnet50 wide_resnet50_2 --batch 256 64",
    )
    parser.add_argument(
        "--model", nargs="+", default=["resnet50", "resnet18"], metavar="MODEL", help="default: resnet50 resnet18"
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[256], metavar="N", help="images; default: 256")
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16"), default=["bf16"], help="default: bf16")
    parser.add_argument(
        "--time-budget", type=float, default=math.inf, metavar="SECONDS", help="what does not fit is left out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="a second folder for the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
