"""What Gram folding makes of rounding, on activations like a trained network's: whole units in 16 bits, against stock
ones and float64.

Channels behind a ReLU are correlated, some output channels of the last conv vary far less than the others, and the
gradient may go along with the output, as that of a loss on it does: errors that are the same at every pixel add up.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastres
from fastres import plan
from fastres.nn import projection_shortcut
from fastres.numerics import assert_three_way

QUIET = 16
"""Output channels of the last conv that vary little: several, as three-way bounds are about norms."""

LOSSES = {
    "of any direction": lambda out, direction: (out * direction).sum(),
    "of the output's size": lambda out, direction: out.square().sum() / 16,  # within float16's range
    "of pooled features": lambda out, direction: out.mean((2, 3)).logsumexp(1).sum(),
}


def correlated(generator, pixels: int, channels: int) -> torch.Tensor:
    """Rows `[pixels, channels]` behind a ReLU, most of whose variance lies in a few directions."""
    directions = torch.randn(channels // 8, channels, generator=generator)
    factors = torch.randn(pixels, channels // 8, generator=generator)
    own = torch.randn(pixels, channels, generator=generator)
    return (factors @ directions / directions.shape[0] ** 0.5 + 0.3 * own + 0.2).relu()


def bottleneck(seed: int, dtype: torch.dtype, width: int, quiet: str) -> tuple[nn.Module, torch.Tensor]:
    """The block, and its input `[N, 4*width, H, W]`. The variances of its last conv's first QUIET channels are 1e-4 of
    the others', for the reason that `quiet` gives: their weights are small, or also lie where the inputs vary least.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = correlated(generator, 6 * 12 * 10, 4 * width).view(6, 12, 10, 4 * width).permute(0, 3, 1, 2)
    block = fastres.nn.Bottleneck(4 * width, width)
    with torch.no_grad():
        for bn in (block.bn1, block.bn2, block.bn3):
            bn.weight.uniform_(0.5, 1.5, generator=generator)
            bn.bias.normal_(0, 0.3, generator=generator)
        a = _last_input(block, x)
        weight = block.conv3.weight[:, :, 0, 0]
        if quiet == "cancellation":
            _, directions = torch.linalg.eigh(a.T.cov())
            weight[:QUIET] = torch.randn(QUIET, 4, generator=generator) @ directions[:, :4].T
        variances = (a @ weight.T).var(0)
        weight[:QUIET] *= (1e-4 * variances[QUIET:].median() / variances[:QUIET]).sqrt()[:, None]
    block = block.to(memory_format=torch.channels_last, dtype=dtype)
    for bn in (block.bn1, block.bn2, block.bn3):
        bn.float()
    return block, x.to(dtype, memory_format=torch.channels_last)


def _last_input(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the last conv reads, as rows."""
    stock = fastres.revert(copy.deepcopy(block))
    a = stock.bn2(stock.conv2(stock.bn1(stock.conv1(x)).relu())).relu()
    return a.permute(0, 2, 3, 1).flatten(0, 2)


def _gradients(model: nn.Module, x: torch.Tensor, loss) -> dict[str, torch.Tensor]:
    """The output of a training step, and the gradients of x and of every parameter."""
    x = x.to(next(t.dtype for t in model.parameters() if t.dim() == 4)).requires_grad_()
    out = model(x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    grads = torch.autograd.grad(loss(out, direction), [x, *model.parameters()])
    return {"out": out, "x": grads[0]} | dict(zip(dict(model.named_parameters()), grads[1:], strict=True))


def _training_step(block: nn.Module, x: torch.Tensor, loss) -> dict[str, torch.Tensor]:
    """As `_gradients`, and what is of the quiet channels once more."""
    results = _gradients(block, x, loss)
    quiet = {
        "out": results["out"][:, :QUIET],
        **{name: results[name][:QUIET] for name in ("conv3.weight", "bn3.weight", "bn3.bias")},
        "variance": block.bn3.running_var[:QUIET],
    }
    return results | {f"{name} of the quiet channels": value for name, value in quiet.items()}


def _library(k: SimpleNamespace) -> SimpleNamespace:
    return plan.in_form(k, gram_folding=True)


def _triton(k: SimpleNamespace) -> SimpleNamespace:
    """Every kernel that Triton has, and the form that they run in."""
    from fastres.kernels import triton

    ours = {name: getattr(triton, name) for name in triton.__all__}
    return SimpleNamespace(**vars(k) | ours | {"gram_folding": True, "fold_projection": True})


@dataclass(frozen=True)
class Run:
    """What is run where. change: of the plan. seeds: pooled, so that few masks that rounding flips do not decide."""

    change: Callable[[SimpleNamespace], SimpleNamespace]
    dtype: torch.dtype
    width: int
    seeds: int
    device: str = "cpu"


def pooled(run: Run, models: Sequence[nn.Module], x: Sequence[torch.Tensor], step) -> None:
    """Every result of `step(model, x)` is as close to float64 as stock's is: over all models, one for each seed."""
    found = [{}, {}, {}]
    for fused, own in zip(models, x, strict=True):
        fused, own = fused.to(run.device), own.to(run.device)
        stock = fastres.revert(copy.deepcopy(fused))
        for results, model in zip(found, (fused, stock, copy.deepcopy(stock).double()), strict=True):
            with plan.wrapping(run.change) if model is fused else contextlib.nullcontext():
                for name, value in step(model, own).items():
                    results.setdefault(name, []).append(value.detach())
    ours, stock, exact = ({name: torch.stack(values) for name, values in results.items()} for results in found)
    assert all(value.isfinite().all() for value in ours.values())
    for name in exact:
        assert_three_way(name, ours[name], stock[name], exact[name], run.dtype)


def check(run: Run, quiet: str, loss: str) -> None:
    blocks, x = zip(*(bottleneck(seed, run.dtype, run.width, quiet) for seed in range(run.seeds)), strict=True)
    for block in blocks:
        block.bn3.momentum = 1.0  # so that running_var is the batch's own
    pooled(run, blocks, x, lambda block, x: _training_step(block, x, LOSSES[loss]))


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RUNS = [
    pytest.param(Run(_library, torch.bfloat16, 64, 3), id="library"),
    pytest.param(Run(_triton, torch.bfloat16, 64, 3, "cuda"), id="triton", marks=on_gpu),
    pytest.param(Run(_triton, torch.float16, 64, 3, "cuda"), id="triton, float16", marks=on_gpu),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("quiet", ["small weights", "cancellation"])
@pytest.mark.parametrize("run", RUNS)
def test_folding_is_as_close_to_float64_as_stock_is(run, quiet, loss):
    check(run, quiet, loss)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("quiet", ["small weights", "cancellation"])
def test_tritons_kernels_interpreted_are_too(quiet):
    """In float16: the interpreter computes bfloat16 wrongly."""
    pytest.importorskip("triton")
    check(Run(_triton, torch.float16, 24, 3), quiet, "of the output's size")


UNITS = {
    "projection": lambda: nn.Sequential(fastres.nn.Projection(64, 256), nn.ReLU()),
    "projection of stride 2": lambda: nn.Sequential(fastres.nn.Projection(64, 256, 2), nn.ReLU()),
    "bottleneck": lambda: fastres.nn.Bottleneck(64, 16),
    "bottleneck with a projection": lambda: fastres.nn.Bottleneck(64, 64, 1, projection_shortcut(64, 256)),
    "basic block with a projection": lambda: fastres.nn.BasicBlock(64, 256, 2, projection_shortcut(64, 256, 2)),
}
GAINS = [1.0, 0.1, 0.0]
"""Of the gamma that ends the main branch. Networks often begin with 0 (`zero_init_residual`): then the shortcut's
gradient is all that there is."""


def behind_a_batch_norm(unit: str, gain: float, seed: int, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """The unit with a batch norm and a ReLU in front, whose gradients are sums over the gradient of its input."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), UNITS[unit]())
    with torch.no_grad():
        for bn in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            bn.weight.uniform_(0.5, 1.5, generator=generator)
            bn.bias.normal_(0, 0.3, generator=generator)
        for name in ("bn3", "bn2"):
            if hasattr(model[2], name):
                getattr(model[2], name).weight.mul_(gain)
                break
    x = correlated(generator, 8 * 14 * 14, 64).view(8, 14, 14, 64).permute(0, 3, 1, 2)
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    for bn in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        bn.float()
    return model, x.to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "unit, gain", [(unit, gain) for unit in UNITS for gain in (GAINS[:1] if unit.startswith("projection") else GAINS)]
)
@pytest.mark.parametrize("run", RUNS)
def test_gradients_in_front_of_a_folded_unit(run, unit, gain):
    """Under a loss of the output's size, whose gradient the batch norms' backward nearly cancels."""
    made = (behind_a_batch_norm(unit, gain, seed, run.dtype) for seed in range(run.seeds))
    models, x = zip(*made, strict=True)
    pooled(run, models, x, lambda model, x: _gradients(model, x, LOSSES["of the output's size"]))
