"""`python -m fastres train`, from its arguments to its exit code."""

import contextlib
import copy
import signal
import sys
import tempfile
import threading
from pathlib import Path

import torch

import fastres
import fastres.models

from .. import info
from . import checkpoint, compare, console, data, options, report
from .engine import Run, Trainer, resolve_device
from .errors import UserError
from .options import Options


def main(args) -> int:
    """Trains as `args`, the namespace of `options.add_arguments`, says.

    Returns:
        0, or 1 when a check of `--compare` failed, or 128 + the signal's number when one ended the run early.

    Raises:
        UserError: an argument or what it names is wrong.
    """
    given = vars(args)
    saved = None
    if "resume" in given:
        path = Path(given["resume"] or Path(options.resolve(given).out, "checkpoint.pt"))
        saved = checkpoint.load(path)
        given = {"out": str(path.parent), **given}
    chosen = options.resolve(given, saved and saved["options"])
    device = _set_up(chosen)
    if chosen.compare:
        report.require_matplotlib()
    folder = _folder(chosen, overwrite=saved is not None or "overwrite" in given or "demo" in given)
    _check_model(chosen.model)

    with console.Progress() as progress:
        dataset = data.load(chosen, progress.log)
        run = Run(_trainers(chosen, dataset, device), dataset, chosen, folder, device, progress)
        if saved:
            run.load(saved)
        with _Signals() as signals:
            finished = run.train(signals.arrived)
    if not finished:
        print(
            f"stopped in epoch {run.position.epoch + 1} of {chosen.epochs}; go on with: "
            f"python -m fastres train --resume {folder / 'checkpoint.pt'}"
        )
        return 128 + signals.number
    print(f"wrote {folder / 'metrics.csv'} and {folder / 'checkpoint.pt'}")
    return _compare(run, dataset, chosen, folder, device) if chosen.compare else 0


def _set_up(chosen: Options) -> torch.device:
    device = resolve_device(chosen.device, chosen.dtype)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    return device


def _folder(chosen: Options, overwrite: bool) -> Path:
    folder = Path(chosen.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"argument --out: {folder} cannot be written ({error.strerror}); name another folder"
        ) from error
    if not overwrite and (folder / "checkpoint.pt").exists():
        raise UserError(
            f"argument --out: {folder} holds a run; go on with it by --resume, replace it by --overwrite, "
            "or name another folder"
        )
    return folder


def _check_model(name: str) -> None:
    """Before any data is fetched."""
    if name not in fastres.models.names():
        try:
            fastres.models.create(name)
        except ValueError as error:
            raise UserError(f"argument --model: {error}") from error


def _trainers(chosen: Options, dataset, device: torch.device) -> dict[str, Trainer]:
    """One model with the seed's initial weights; with `--compare` its stock twin besides."""
    torch.manual_seed(chosen.seed)
    shape = {"num_classes": len(dataset.classes), "in_channels": dataset.in_channels}
    if chosen.width:
        shape["width"] = chosen.width
    try:
        model = fastres.models.create(chosen.model, **shape)
    except TypeError as error:
        raise UserError(f"argument --width: {chosen.model} has one width; leave --width out") from error
    stock = fastres.revert(copy.deepcopy(model))
    models = {}
    if chosen.compare or chosen.backend == "stock":
        models["stock"] = stock
    if chosen.backend != "stock":
        try:
            models["fused"] = fastres.convert(model, backend=chosen.backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"argument --backend: {error}") from error
    return {name: Trainer(model, chosen, device) for name, model in models.items()}


def _compare(run: Run, dataset, chosen: Options, folder: Path, device: torch.device) -> int:
    batch = next(iter(dataset.train_batches(chosen.seed, 0, chosen.batch)))
    costs = {
        name: compare.costs(name, trainer, chosen, device, batch, run.rows) for name, trainer in run.trainers.items()
    }
    checks = compare.checks(run.rows, chosen)
    conditions = info.machine(device)
    path = report.write(folder, run.rows, checks, costs, chosen, dataset.name, conditions)
    print(f"wrote {path} and its pictures")
    console.print_table(
        f"{options.model_title(chosen)} on {dataset.name}: stock and fused",
        report.CHECK_COLUMNS,
        report.check_rows(checks),
    )
    return 1 if any(check.ok is False for check in checks) else 0


class _Signals(contextlib.AbstractContextManager):
    """Turns the first Ctrl-C or SIGTERM into an answer to `arrived`; the second one ends the program at once."""

    def __init__(self):
        self.number = 0
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        self._restore()

    def arrived(self) -> bool:
        return self.number != 0

    def _note(self, number, frame) -> None:
        self.number = number
        self._restore()
        print("saving a checkpoint after this step; once more to stop at once", file=sys.stderr)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
