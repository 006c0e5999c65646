"""What `python -m fastres train` takes: names, defaults, the `--demo` preset, and which value wins.

An explicit argument wins over the checkpoint's (with `--resume`), which wins over the preset's, which wins over the
default. Imports no torch, so that `--help` is quick.
"""

import argparse
import dataclasses
import math
from pathlib import Path

from .errors import UserError

DATASETS = ("fashion-mnist", "folder")
DTYPES = ("fp32", "bf16", "fp16")


@dataclasses.dataclass
class Options:
    """Everything that a run depends on. Stored in the checkpoint, so only plain values."""

    model: str = "cifar_resnet20"
    width: int = 0
    backend: str = "auto"
    compare: bool = False
    min_accuracy: float = 0.0
    dataset: str = "fashion-mnist"
    data: str = ".data"
    offline: bool = False
    train_images: int = 0
    test_images: int = 0
    augment: bool = True
    image_size: int = 224
    workers: int = 2
    epochs: int = 10
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.5
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    label_smoothing: float = 0.0
    dtype: str = "fp32"
    device: str = "auto"
    memory_format: str = "channels_last"
    threads: int = 0
    seed: int = 0
    out: str = ""


# The long warm-up keeps the first steps small: at larger ones two float32 runs of the very same network, apart by one
# rounding, are further apart after 20 steps than the limit that stock and fused are held to.
DEMO = {
    "compare": True,
    "model": "cifar_resnet11_bottleneck",
    "width": 8,
    "train_images": 40000,
    "augment": False,
    "epochs": 2,
    "batch": 64,
    "lr": 0.05,
    "warmup": 0.75,
    "nesterov": True,
    "weight_decay": 5e-4,
    "min_accuracy": 85.0,
    "out": "runs/demo",
}

# What may differ when a run resumes: where things are, how they run and how long, not what a step computes.
FREE_ON_RESUME = {"data", "offline", "workers", "device", "threads", "out", "epochs", "min_accuracy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train`. None has a default here: the namespace holds what the user gave, nothing else."""
    parser.argument_default = argparse.SUPPRESS
    what = parser.add_argument_group("what is trained")
    _add(what, "--model", metavar="NAME", help="one of fastres.models.names()")
    _add(
        what, "--width", type=_count, metavar="N", help="channels of a cifar_ model's first stage (0: the model's own)"
    )
    _add(what, "--backend", metavar="NAME", help="backend of the fused blocks, or 'stock' for PyTorch's own blocks")
    _add_switch(what, "--compare", "train stock and fused side by side and write report.md")
    _add(
        what,
        "--min-accuracy",
        type=_percent,
        metavar="PERCENT",
        help="with --compare: fail at or below this test accuracy",
    )
    what.add_argument("--demo", action="store_true", help="preset: " + as_arguments(DEMO))

    data = parser.add_argument_group("data")
    _add(
        data,
        "--dataset",
        choices=DATASETS,
        help="'folder' reads DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg with torchvision",
    )
    _add(data, "--data", metavar="DIR", help="where the data is, or where Fashion-MNIST is put")
    _add_switch(data, "--offline", "never fetch the data")
    _add(data, "--train-images", type=_count, metavar="N", help="use the first N training images (0: all)")
    _add(data, "--test-images", type=_count, metavar="N", help="use the first N test images (0: all)")
    _add_switch(data, "--augment", "random crops and mirroring")
    _add(data, "--image-size", type=positive, metavar="PIXELS", help="side of the crops of a folder's images")
    _add(data, "--workers", type=_count, metavar="N", help="processes that decode a folder's images")

    how = parser.add_argument_group("how it is trained")
    _add(how, "--epochs", type=positive, metavar="N")
    _add(how, "--batch", type=positive, metavar="N", help="images per step")
    _add(how, "--lr", type=_non_negative, metavar="X", help="peak learning rate")
    _add(how, "--momentum", type=_non_negative, metavar="X")
    _add_switch(how, "--nesterov", "Nesterov's momentum")
    _add(how, "--weight-decay", type=_non_negative, metavar="X")
    _add(how, "--schedule", choices=("cosine", "step"), help="learning rate after the warm-up")
    _add(how, "--warmup", type=_non_negative, metavar="EPOCHS", help="epochs of linear warm-up")
    _add(
        how,
        "--milestones",
        type=_fractions,
        metavar="A,B,..",
        help="fractions of the run at which 'step' multiplies by --gamma",
    )
    _add(how, "--gamma", type=_non_negative, metavar="X")
    _add(how, "--label-smoothing", type=_fraction, metavar="X")
    _add(how, "--dtype", choices=DTYPES, help="fp32 runs without TF32; bf16 and fp16 run under autocast")
    _add(how, "--device", metavar="NAME", help="cpu, cuda, cuda:1 ('auto': a GPU where there is one)")
    _add(how, "--memory-format", choices=("channels_last", "contiguous"))
    _add(how, "--threads", type=_count, metavar="N", help="CPU threads (0: PyTorch's choice)")
    _add(how, "--seed", type=_count, metavar="N", help="of initial weights, data order and augmentation")

    files = parser.add_argument_group("files")
    files.add_argument("--out", metavar="DIR", help="metrics.csv, checkpoint.pt, report (default: runs/MODEL)")
    files.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from a checkpoint (default: checkpoint.pt in --out), to the same numbers",
    )
    files.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")


def as_arguments(values: dict) -> str:
    """Option values as they are written on the command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(_flag(name) if value else _flag("no_" + name))
        else:
            words.append(f"{_flag(name)} {_text(value)}")
    return " ".join(words)


def model_title(options: Options) -> str:
    """The model as reports name it."""
    return f"{options.model}, width {options.width}" if options.width else options.model


def command(options: Options) -> str:
    """The command that makes this run, without what is as by default."""
    values = dataclasses.asdict(options)
    return "python -m fastres train " + as_arguments(
        {name: value for name, value in values.items() if _plain(value) != _plain(getattr(Options, name))}
    )


def resolve(given: dict, saved: dict | None = None) -> Options:
    """Options from what the user gave and, when resuming, from what the checkpoint holds.

    Args:
        given: explicit arguments, as `vars(namespace)`; names that `Options` lacks are ignored.
        saved: the checkpoint's options, or None for a new run.

    Raises:
        UserError: an explicit argument contradicts the checkpoint.
    """
    names = {field.name for field in dataclasses.fields(Options)}
    explicit = {name: value for name, value in given.items() if name in names}
    if given.get("demo"):
        explicit = {**DEMO, **explicit}
    if saved is not None:
        for name, value in explicit.items():
            if name not in FREE_ON_RESUME and name in saved and _plain(saved[name]) != _plain(value):
                given_as = as_arguments({name: value})
                raise UserError(
                    f"argument {given_as.split()[0]}: the checkpoint has {as_arguments({name: saved[name]})}; "
                    f"leave {given_as} out, or start a new run without --resume"
                )
        explicit = {**{name: value for name, value in saved.items() if name in names}, **explicit}
    options = Options(**explicit)
    options.milestones = tuple(options.milestones)
    if options.compare and options.backend == "stock":
        raise UserError(
            "argument --backend: 'stock' leaves nothing to compare; name a fused backend, or leave --compare out"
        )
    if options.nesterov and not options.momentum:
        raise UserError("argument --nesterov: needs a --momentum above 0")
    options.out = options.out or str(Path("runs") / options.model)
    return options


def _add(group, flag: str, **keywords) -> None:
    default = getattr(Options, flag[2:].replace("-", "_"))
    keywords["help"] = f"{keywords.get('help', '')} (default: {_text(default)})".strip()
    group.add_argument(flag, **keywords)


def _add_switch(group, flag: str, help: str) -> None:
    default = "on" if getattr(Options, flag[2:]) else "off"
    group.add_argument(flag, action=argparse.BooleanOptionalAction, help=f"{help} (default: {default})")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _number(text: str, kind, accept, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not math.isfinite(value) or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def positive(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def _count(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def _non_negative(text: str) -> float:
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def _percent(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 100, "a number from 0 to 100")


def _fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(_fraction(part) for part in text.split(","))
