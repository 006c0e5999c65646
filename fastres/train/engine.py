"""One training step, and the loop that drives one model or several side by side on the same batches."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint, metrics
from .errors import UserError
from .metrics import Metrics
from .options import Options
from .schedule import Schedule

# Losses and times stay on the device for so many steps: reading them makes the CPU wait for the GPU.
STEPS_PER_READING = 10

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def resolve_device(name: str, dtype: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: there is no such device, or it cannot train in `dtype`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"argument --device: {name!r} is no device; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"argument --device: training on {device.type} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("argument --device: PyTorch sees no GPU here; give --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"argument --device: there is no {name}; give cuda:0 to cuda:{torch.cuda.device_count() - 1}"
            )
        with torch.cuda.device(device):
            if dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError(
                    f"argument --dtype: {torch.cuda.get_device_name(device)} has no bf16; give fp16 or fp32"
                )
    elif dtype == "fp16":
        raise UserError("argument --dtype: fp16 needs a GPU; give bf16 or fp32")
    return device


class Trainer:
    """A model with its optimizer: SGD with momentum, cross entropy, autocast for 16-bit dtypes, loss scaling for fp16.

    Weight decay applies to every parameter, as in He et al., "Deep Residual Learning for Image Recognition", 2016.

    Args:
        model: takes float32 images `[N, C, H, W]` and returns logits `[N, classes]`. Moved to `device` in place.
    """

    def __init__(self, model: nn.Module, options: Options, device: torch.device):
        self._format = _FORMATS[options.memory_format]
        self.model = model.to(device, memory_format=self._format)
        self._device = device
        self._dtype = DTYPES[options.dtype]
        self._smoothing = options.label_smoothing
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            options.lr,
            options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "fp16")

    def place(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch on this trainer's device, in its memory format."""
        return images.to(self._device, memory_format=self._format), labels.to(self._device)

    def step(self, images: torch.Tensor, labels: torch.Tensor, lr: float) -> torch.Tensor:
        """One step on a placed batch. Returns the loss before it, float32, zero-dimensional, still on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        loss = self.loss(images, labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The training loss of a placed batch, float32."""
        return F.cross_entropy(self._logits(images), labels, label_smoothing=self._smoothing)

    def evaluate(self, batches: Iterable, stop: Callable[[], bool] = lambda: False) -> tuple[float, float] | None:
        """Mean cross entropy and accuracy in percent over `batches`; None when `stop` said so before the end."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        right = torch.zeros((), dtype=torch.int64, device=self._device)
        count = 0
        with torch.inference_mode():
            for batch in batches:
                if stop():
                    return None
                images, labels = self.place(*batch)
                logits = self._logits(images)
                loss += F.cross_entropy(logits, labels, reduction="sum")
                right += (logits.argmax(1) == labels).sum()
                count += len(labels)
        return float(loss) / count, 100 * int(right) / count

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, RuntimeError or ValueError when `state` is another model's."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = self.model(images)
        return logits.float()


@dataclasses.dataclass
class Position:
    """Where a run is: `step` steps into epoch `epoch`, both counted from 0."""

    epoch: int = 0
    step: int = 0


class Run:
    """Trains every trainer on every batch, step by step in turn; keeps `metrics.csv` and `checkpoint.pt` in `folder`.

    The trainers take turns in going first, so that none is always the one that finds the batch in the cache.

    Args:
        trainers: by variant, "stock" and "fused" or one of them.
        dataset: see `data.py`.
        progress: see `console.Progress`.

    `rows` holds what `metrics.csv` does, `position` where the run is.
    """

    def __init__(
        self, trainers: dict[str, Trainer], dataset, options: Options, folder: Path, device: torch.device, progress
    ):
        self.trainers = trainers
        self.position = Position()
        self.rows: list[dict] = []
        self.steps_per_epoch = dataset.train_size // options.batch
        self._dataset = dataset
        self._options = options
        self._folder = folder
        self._device = device
        self._progress = progress
        self._pending: list[tuple] = []
        steps = options.epochs * self.steps_per_epoch
        self._schedule = Schedule(
            options.schedule,
            options.lr,
            steps,
            round(options.warmup * self.steps_per_epoch),
            options.milestones,
            options.gamma,
        )

    def train(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Trains from `position` to the end and saves a checkpoint after each epoch.

        Args:
            stop: asked after each step; True saves a checkpoint and ends the run there.

        Returns:
            Whether the run came to its end.

        Raises:
            UserError: the loss is no longer finite.
        """
        with Metrics(self._folder / "metrics.csv", self.rows) as self._metrics:
            while self.position.epoch < self._options.epochs:
                finished = self._train_epoch(stop) and self._evaluate(stop)
                if finished:
                    self.position = Position(self.position.epoch + 1)
                self._metrics.flush()
                self._save()
                if not finished:
                    return False
        return True

    def _save(self) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self._device)
        checkpoint.save(
            self._folder / "checkpoint.pt",
            {
                "options": dataclasses.asdict(self._options),
                "epoch": self.position.epoch,
                "step": self.position.step,
                "trainers": {name: trainer.state_dict() for name, trainer in self.trainers.items()},
                "rng": rng,
            },
        )

    def load(self, contents: dict) -> None:
        """Goes to where a checkpoint was made, and takes the rows of `metrics.csv` up to there.

        Raises:
            UserError: it was made with another model or another number of steps per epoch.
        """
        try:
            for name, trainer in self.trainers.items():
                trainer.load_state_dict(contents["trainers"][name])
            torch.set_rng_state(contents["rng"]["cpu"])
            if self._device.type == "cuda" and "cuda" in contents["rng"]:
                torch.cuda.set_rng_state(contents["rng"]["cuda"], self._device)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"argument --resume: the checkpoint does not fit {self._options.model} ({reason}); "
                "resume with the data and the version that it was made with"
            ) from error
        self.position = Position(contents["epoch"], contents["step"])
        if self.position.step > self.steps_per_epoch:
            raise UserError(
                f"argument --data: the checkpoint is {self.position.step} steps into an epoch, but these images give "
                f"{self.steps_per_epoch}; resume with the data that it was made with"
            )
        steps = self.position.epoch * self.steps_per_epoch + self.position.step
        self.rows = metrics.read(self._folder / "metrics.csv", self.position.epoch, steps)

    def _train_epoch(self, stop) -> bool:
        self._progress.epoch(self.position.epoch, self._options.epochs, self.position.step, self.steps_per_epoch)
        batches = self._dataset.train_batches(
            self._options.seed, self.position.epoch, self._options.batch, self.position.step
        )
        for batch in batches:
            step = self.position.epoch * self.steps_per_epoch + self.position.step
            lr = self._schedule(step)
            names = list(self.trainers)
            if step % 2:
                names.reverse()
            for name in names:
                trainer = self.trainers[name]
                placed = trainer.place(*batch)
                clock = _Clock(self._device)
                loss = trainer.step(*placed, lr)
                clock.stop()
                self._pending.append((name, self.position.epoch + 1, step + 1, lr, loss, clock))
            self.position.step += 1
            interrupted = stop()
            if interrupted or self.position.step % STEPS_PER_READING == 0 or self.position.step == self.steps_per_epoch:
                self._read()
            if interrupted:
                return False
        return True

    def _read(self) -> None:
        latest = {}
        for name, epoch, step, lr, loss, clock in self._pending:
            value = float(loss)
            self._metrics.add(variant=name, epoch=epoch, step=step, lr=lr, loss=value, seconds=clock.seconds())
            latest[name] = value
            if not math.isfinite(value):
                self._metrics.flush()
                raise UserError(
                    f"argument --lr: the {name} model's loss became {value} at step {step}; "
                    "give a smaller --lr or a longer --warmup"
                )
        self._pending.clear()
        self._metrics.flush()
        self._progress.step(self.position.step, latest)

    def _evaluate(self, stop) -> bool:
        results = {}
        for name, trainer in self.trainers.items():
            result = trainer.evaluate(self._dataset.test_batches(self._options.batch), stop)
            if result is None:
                return False
            results[name] = result
        epoch = self.position.epoch + 1
        for name, (loss, accuracy) in results.items():
            self._metrics.add(
                variant=name, epoch=epoch, step=epoch * self.steps_per_epoch, test_loss=loss, test_accuracy=accuracy
            )
        self._progress.tested(epoch, self._options.epochs, {name: accuracy for name, (_, accuracy) in results.items()})
        return True


class _Clock:
    """Times one step: by the clock on a CPU, by events on a GPU, which make the CPU wait only when they are read."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._start = self._now()

    def stop(self) -> None:
        self._end = self._now()

    def seconds(self) -> float:
        if self._stream is None:
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def _now(self):
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event
