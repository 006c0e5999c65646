"""Units and models as experiments: training split into its phases, and inference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres import cost

from .experiment import Experiment, Ready, Variant, Work
from .gate import REFERENCE, Named, no_search
from .modules import STOCK, Flavour, Gate, Inputs, Subject, flavours
from .timing import Parts, Settings, release

UNIT_SETTINGS = {
    "cuda": Settings(burst=0.03, samples=30, limit=6.0, warmup=1.0),
    "cpu": Settings(burst=0.01, samples=10, limit=1.5, warmup=0.3, first=2, window=2),
}
MODEL_SETTINGS = {
    "cuda": Settings(burst=0.1, samples=20, limit=25.0, warmup=3.0, first=4),
    "cpu": Settings(burst=0.02, samples=10, limit=4.0, warmup=1.0, first=2, window=2),
}

_COMPILE_SECONDS = {"default": 60.0, "max-autotune": 180.0, "reduce-overhead": 60.0}
"""What compiling ResNet-50 may take, generously: where a time budget has less left it is not begun, because it cannot
be stopped. Smaller models take less, in proportion to their convolutions."""
_COMPILE_CONVS = 53

Start = Callable[[Subject, Tensor, Tensor], tuple[Parts, Callable[[], str | None]]]
"""Makes of a subject and its inputs the parts that are timed, and what is asked after the timing."""


def unit_training(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    modes: Sequence[str] = (),
) -> Experiment:
    """Forward and backward of a block or another unit, with its input's gradient where the input is no image.

    Args:
        make: gives the module of `fastres.nn`; its stock class is the baseline.
        shape: of the input, NCHW.
        modes: of torch.compile.
    """
    stock = _stock(make).to(device)
    needs_grad = shape[1] != 3
    activations = dtype if dtype.itemsize == 2 else torch.float32
    with torch.no_grad(), no_search():
        out = stock(torch.randn(2, *shape[1:], device=device)).shape[1:]

    def inputs(seed: int, images: int) -> Inputs:
        random = torch.Generator(device).manual_seed(seed)
        x, g = (torch.randn(images, *size, generator=random, device=device) for size in (shape[1:], out))
        return x.to(activations).requires_grad_(needs_grad), g.to(activations)

    def start(subject: Subject, x: Tensor, g: Tensor):
        x, g, outputs = subject.place(x), subject.place(g), []
        wanted = list(_leaves(subject, x).values())
        return {
            "forward": lambda: outputs.append(subject(x)),
            "backward": lambda: torch.autograd.grad(outputs.pop(), wanted, g),
        }, lambda: None

    @functools.cache
    def steps(scheme: str) -> list[cost.Step]:
        if not needs_grad:
            return cost.training_step(stock, shape, dtype, scheme=scheme)
        # A conv in front, which is not counted, for the input to need a gradient.
        network = nn.Sequential(nn.Conv2d(shape[1], shape[1], 1), stock)
        return [step for step in cost.training_step(network, shape, dtype, scheme=scheme) if step.unit == "1"]

    phases = "forward", "backward", "step"
    job = _Job("units", name, phases, stock, shape, dtype, device, inputs, start, _unit_results, steps)
    return job.experiment(UNIT_SETTINGS[device.type], modes)


def model_training(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, modes: Sequence[str] = ()
) -> Experiment:
    """A training step of a model of `fastres.models`: forward with the loss, backward, and SGD with momentum.

    The images and labels are random. shape: of the images, NCHW. modes: of torch.compile.
    """
    stock = _stock_model(name, shape, device)

    def start(subject: Subject, images: Tensor, labels: Tensor):
        images, losses, last = subject.place(images), [], []
        # So small a rate that hundreds of steps on one batch leave ordinary numbers to compute with.
        sgd = torch.optim.SGD(subject.module.parameters(), 1e-4, momentum=0.9)

        def forward():
            losses.append(F.cross_entropy(subject(images).float(), labels))
            last[:] = [losses[-1].detach()]

        def optimizer():
            sgd.step()
            sgd.zero_grad(set_to_none=True)

        def finish():
            return None if math.isfinite(last[0].item()) else f"the loss became {last[0].item()}"

        return {"forward": forward, "backward": lambda: losses.pop().backward(), "optimizer": optimizer}, finish

    @functools.cache
    def steps(scheme: str) -> list[cost.Step]:
        return cost.training_step(stock, shape, dtype, scheme=scheme)

    phases = "forward", "backward", "optimizer", "step"
    inputs = _images(shape, device, stock)
    job = _Job("models", name, phases, stock, shape, dtype, device, inputs, start, _training_results, steps)
    return job.experiment(MODEL_SETTINGS[device.type], modes)


def model_inference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, modes: Sequence[str] = ()
) -> Experiment:
    """Logits of a model in eval mode; the arguments are those of `model_training`."""
    stock = _stock_model(name, shape, device).eval()

    def start(subject: Subject, images: Tensor, labels: Tensor):
        images = subject.place(images)

        def inference():
            with torch.inference_mode():
                subject(images)

        return {"inference": inference}, lambda: None

    inputs = _images(shape, device, stock)
    job = _Job("models", name, ("inference",), stock, shape, dtype, device, inputs, start, _inference_results)
    return job.experiment(MODEL_SETTINGS[device.type], modes)


@dataclass(frozen=True)
class _Job:
    """What units and models have in common. The first fields are those of `Experiment`.

    stock: the module, on the device. inputs: `inputs(seed, images)`. evaluate: what the gate compares, see `Gate`.
    steps: of one training step by a scheme of `fastres.cost`, where there is one.
    """

    group: str
    name: str
    phases: tuple[str, ...]
    stock: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    inputs: Callable[[int, int], Inputs]
    start: Start
    evaluate: Callable[[Subject, Tensor, Tensor], Named]
    steps: Callable[[str], list[cost.Step]] | None = None

    def experiment(self, settings: Settings, modes: Sequence[str]) -> Experiment:
        # The baselines of many experiments are compilations of the same few forward functions, of which torch.compile
        # keeps no more than eight each.
        torch.compiler.reset()
        batch = self.shape[0]
        gate = Gate(self.stock, self.dtype, self.device, batch, self.inputs, self.evaluate)
        convs = sum(isinstance(module, nn.Conv2d) for module in self.stock.modules())
        variants = {
            variant: Variant(
                functools.partial(self._prepare, gate, variant, flavour),
                flavour.backend if flavour.backend != "auto" else None,
                0.0 if flavour.mode is None else max(10.0, _COMPILE_SECONDS[flavour.mode] * convs / _COMPILE_CONVS),
            )
            for variant, flavour in flavours(self.dtype, self.device, modes).items()
        }
        return Experiment(
            self.group, self.name, self.phases, self.shape, self.dtype, batch, variants, settings, forget=gate.forget
        )

    def _prepare(self, gate: Gate, variant: str, flavour: Flavour) -> Ready:
        if variant != STOCK:
            gate.known(flavour)  # before memory is looked at: it belongs to no variant
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        subject = Subject(self.stock, flavour, self.dtype, self.device)
        verdict = REFERENCE if variant == STOCK else gate.verdict(subject, flavour)
        if verdict.refused is not None:
            return Ready({}, verdict)
        x, target = self.inputs(0, self.shape[0])
        parts, finish = self.start(subject, x, target)
        parts = {phase: subject.planned(part) for phase, part in parts.items()}
        saved = None if self.steps is None else subject.saved_bytes(subject.place(x))
        del x
        release()
        peak = subject.peak_memory(before, lambda: [part() for part in parts.values()])
        return Ready(parts, verdict, self._work(flavour), peak, saved, finish)

    def _work(self, flavour: Flavour) -> Mapping[str, Work]:
        """By phase. The plan that is counted as today's is a GPU's, so that on a CPU ours has none."""
        if self.steps is None or (
            flavour.backend is not None and (flavour.backend != "auto" or flavour.change or self.device.type == "cpu")
        ):
            return {}
        steps = self.steps("stock" if flavour.backend is None else "today")
        by_phase = {phase: [step for step in steps if step.direction == phase] for phase in ("forward", "backward")}
        by_phase["step"] = steps
        return {phase: Work(cost.total(some).bytes, cost.total(some).flops) for phase, some in by_phase.items()}


def _stock(make: Callable[[], nn.Module]) -> nn.Module:
    """A module of stock classes, the same at every call, whose batch norms are away from their initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = fastres.revert(make())
        for module in stock.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return stock


def _stock_model(name: str, shape: tuple[int, ...], device: torch.device) -> nn.Module:
    """A model in training mode, with the running statistics of random images."""
    from fastres import models

    model = _stock(lambda: models.create(name, in_channels=shape[1])).to(device)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad(), no_search():
        model(_images(shape, device, model)(1, 2)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def _images(shape: tuple[int, ...], device: torch.device, model: nn.Module) -> Callable[[int, int], Inputs]:
    classes = model.fc.out_features

    def inputs(seed: int, images: int) -> Inputs:
        random = torch.Generator(device).manual_seed(seed)
        return (
            torch.randn(images, *shape[1:], generator=random, device=device),
            torch.randint(0, classes, (images,), generator=random, device=device),
        )

    return inputs


def _leaves(subject: Subject, x: Tensor) -> dict[str, Tensor]:
    return ({"x": x} if x.requires_grad else {}) | dict(subject.module.named_parameters())


def _unit_results(subject: Subject, x: Tensor, g: Tensor) -> Named:
    """Output, gradients and buffers."""
    x, g = subject.place(x), subject.place(g)
    out = subject(x)
    leaves = _leaves(subject, x)
    gradients = torch.autograd.grad(out, list(leaves.values()), g)
    buffers = {name: buffer.clone() for name, buffer in subject.module.named_buffers()}
    return {"output": out.detach().clone()} | dict(zip(leaves, gradients, strict=True)) | buffers


def _training_results(subject: Subject, images: Tensor, labels: Tensor) -> Named:
    """Loss and logits, and all gradients, as one vector each: stock's error of a single number may be 0 by chance."""
    logits = subject(subject.place(images))
    loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)
    outputs = torch.cat([loss.detach().view(1), logits.detach().flatten()])
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in subject.module.parameters()])
    return {"loss and logits": outputs, "gradients": gradients}


def _inference_results(subject: Subject, images: Tensor, labels: Tensor) -> Named:
    with torch.inference_mode():
        logits = subject(subject.place(images))
    return {"logits": logits.clone()}
