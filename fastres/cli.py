"""`python -m fastres`: its commands and their arguments. Each command imports what it needs when it runs."""

import argparse
import json
import os
import select
import sys

from .parts import PARTS
from .train import options
from .train.errors import UserError

PROGRAM = "python -m fastres"

_STDOUT = 1  # its descriptor


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its arguments, by default the program's.

    Returns:
        The exit code: 0; 1 when a check failed; 2 for a mistake in the arguments or what they name; 130 after Ctrl-C.
    """
    code = 0
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"{PROGRAM} {arguments.command}: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
    return code


def _reader_is_gone() -> bool:
    """Whether whoever read stdout has read enough, as `| head` does; then what is still to be written goes nowhere."""
    poll = select.poll()
    poll.register(_STDOUT, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True


class _Parser(argparse.ArgumentParser):
    """Prints a mistake as one line, without the usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Fused residual blocks for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = _command(
        commands,
        "info",
        _info,
        "what this machine offers: every backend, available or why not",
        "python -m fastres info",
        "python -m fastres info --json",
    )
    info.add_argument("--json", action="store_true", help="print JSON")

    _command(
        commands,
        "verify",
        _verify,
        "check every unit and kernel that can run here against exact results",
        "python -m fastres verify",
    )

    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "registers, spills, memory and instructions of every Triton kernel, compiled for GPUs that need not be there",
        "python -m fastres inspect",
        "python -m fastres inspect --part h200 rtx4090 --kernel bn_act",
        "python -m fastres inspect --family batch_norm --part 100 --json",
    )
    inspect.add_argument(
        "--part",
        nargs="+",
        default=["80", "90"],
        metavar="PART",
        help="compute capabilities, such as 90, or GPUs, such as h200 (default: 80 90)",
    )
    inspect.add_argument("--family", metavar="NAME", help="only this family of kernels, such as batch_norm")
    inspect.add_argument("--kernel", metavar="NAME", help="only the cases that call this kernel, such as bn_act")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    explain = _command(
        commands,
        "explain",
        _explain,
        "how each block of a model is fused, or why not, and what a training step moves and computes",
        "python -m fastres explain resnet50",
        "python -m fastres explain resnet50 --batch 256",
        "python -m fastres explain resnet18 --input 64,3,512,512 --part a100 --dtype fp16",
    )
    explain.add_argument("model", metavar="MODEL", help="one of fastres.models.names()")
    images = explain.add_mutually_exclusive_group()
    images.add_argument(
        "--batch",
        type=options.positive,
        metavar="N",
        help="count a training step of N images of the usual size on a GPU; none needs to be there",
    )
    images.add_argument("--input", type=_shape, metavar="N,C,H,W", help="the same for images of any size")
    explain.add_argument(
        "--part", choices=list(PARTS), default="h200", help="the GPU whose floor times are shown (default: h200)"
    )
    explain.add_argument("--dtype", choices=options.DTYPES, default="bf16", help="of the activations (default: bf16)")

    train = _command(
        commands,
        "train",
        _train,
        "train a model on Fashion-MNIST or a folder of images",
        "python -m fastres train --model cifar_resnet20 --epochs 5",
        "python -m fastres train --model resnet50 --dataset folder --data photos --dtype bf16 --epochs 90",
        "python -m fastres train --model cifar_resnet20 --compare",
        "python -m fastres train --resume runs/cifar_resnet20/checkpoint.pt",
    )
    options.add_arguments(train)

    report = _command(
        commands,
        "report",
        _report,
        "write result files of the benchmarks as Markdown and pictures, and compare them with earlier ones",
        "python -m fastres report benchmarks/results/nvidia-h200",
        "python -m fastres report kernels.json models.json --out report",
        "python -m fastres report new --compare old     # exit code 1 when something of fastres got slower",
    )
    report.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="result files of one device, or folders with a results.json; of rows in several the last file's count",
    )
    report.add_argument("--compare", metavar="EARLIER", help="a result file or folder to compare with")
    report.add_argument("--out", metavar="DIR", help="where report.md goes (default: the folder of the first RESULTS)")
    return parser


def _command(commands, name: str, run, what: str, *examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog="\n".join(["examples:", *("  " + example for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _info(arguments) -> int:
    from . import info

    if arguments.json:
        print(json.dumps(info.gather(), indent=2))
    else:
        info.show()
    return 0


def _explain(arguments) -> int:
    import torch

    import fastres
    import fastres.models

    from . import cost
    from .train.engine import DTYPES

    shape = arguments.input
    if arguments.batch is not None:
        shape = (arguments.batch, *fastres.models.image_shape(arguments.model))
    channels = {} if shape is None else {"in_channels": shape[1]}
    try:
        model = fastres.models.create(arguments.model, **channels)
    except ValueError as error:
        raise UserError(f"argument MODEL: {error}") from error
    dtype = DTYPES[arguments.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu" if shape is None else "meta"
    try:
        explanation = fastres.explain(model, shape, dtype=dtype, device=device)
    except ValueError as error:
        raise UserError(f"argument --input: {error}") from error
    planned = {"cuda": "this GPU", "cpu": "this CPU", "meta": "a GPU"}[device]
    print(f"The plan of {planned} for {arguments.dtype} activations:\n\n{explanation}")
    if shape is not None:
        print(f"\n{cost.compare(model, shape, dtype, PARTS[arguments.part])}")
    return 0


def _inspect(arguments) -> int:
    from . import inspection

    return inspection.main(arguments)


def _verify(arguments) -> int:
    from . import verify

    return verify.main(arguments)


def _report(arguments) -> int:
    from .measure import report

    return report.main(arguments)


def _train(arguments) -> int:
    from .train import run

    return run.main(arguments)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not four whole numbers of at least 1, such as 8,3,224,224")
    return shape
