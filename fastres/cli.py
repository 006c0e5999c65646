"""`python -m fastres`: its commands and their arguments. Each command imports what it needs when it runs."""

import argparse
import json
import sys

from .train import options
from .train.errors import UserError

PROGRAM = "python -m fastres"


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its arguments, by default the program's.

    Returns:
        The exit code: 0; 1 when a check failed; 2 for a mistake in the arguments or what they name; 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"{PROGRAM} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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

    explain = _command(
        commands,
        "explain",
        _explain,
        "how each block of a model is fused, or why not",
        "python -m fastres explain resnet50",
        "python -m fastres explain resnet50 --input 8,3,224,224",
    )
    explain.add_argument("model", metavar="MODEL", help="one of fastres.models.names()")
    explain.add_argument("--input", type=_shape, metavar="N,C,H,W", help="show the shapes that this input gives")

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
    import fastres
    import fastres.models

    channels = {} if arguments.input is None else {"in_channels": arguments.input[1]}
    try:
        model = fastres.models.create(arguments.model, **channels)
    except ValueError as error:
        raise UserError(f"argument MODEL: {error}") from error
    try:
        explanation = fastres.explain(model, arguments.input)
    except ValueError as error:
        raise UserError(f"argument --input: {error}") from error
    print(explanation)
    return 0


def _verify(arguments) -> int:
    from . import verify

    return verify.main(arguments)


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
