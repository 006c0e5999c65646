"""What Gram folding makes of rounding, on activations like a trained network's: a whole bottleneck in 16 bits, against
the stock one and float64.

Channels behind a ReLU are correlated, one output channel of the last conv varies far less than the others, and the
gradient may go along with the output, as that of a loss on it does: errors that are the same at every pixel add up.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastres
from fastres import plan
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


def _training_step(block: nn.Module, x: torch.Tensor, loss, direction: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every result of a training step, and those of the quiet channels apart."""
    x = x.to(block.conv1.weight.dtype).requires_grad_()
    out = block(x)
    grads = torch.autograd.grad(loss(out, direction.to(out.dtype)), [x, *block.parameters()])
    names = ("x", *(name for name, _ in block.named_parameters()))
    results = {"out": out, **dict(zip(names, grads, strict=True))}
    quiet = {
        "out": out[:, :QUIET],
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
    return SimpleNamespace(**vars(k) | ours | {"gram_folding": True, "conv3x3_fuses": False})


@dataclass(frozen=True)
class Run:
    """What is run where. change: of the plan. seeds: pooled, so that few masks that rounding flips do not decide."""

    change: Callable[[SimpleNamespace], SimpleNamespace]
    dtype: torch.dtype
    width: int
    seeds: int
    device: str = "cpu"


def check(run: Run, quiet: str, loss: str) -> None:
    found = [{}, {}, {}]
    for seed in range(run.seeds):
        fused, x = (t.to(run.device) for t in bottleneck(seed, run.dtype, run.width, quiet))
        fused.bn3.momentum = 1.0  # so that running_var is the batch's own
        stock = fastres.revert(copy.deepcopy(fused))
        exact = copy.deepcopy(stock).double()
        direction = torch.randn(6, 4 * run.width, 12, 10, generator=torch.Generator().manual_seed(seed)).to(x)
        for results, block in zip(found, (fused, stock, exact), strict=True):
            with plan.wrapping(run.change) if block is fused else contextlib.nullcontext():
                for name, value in _training_step(block, x, LOSSES[loss], direction).items():
                    results.setdefault(name, []).append(value.detach())
    ours, stock, exact = ({name: torch.stack(values) for name, values in results.items()} for results in found)
    assert all(value.isfinite().all() for value in ours.values())
    for name in exact:
        assert_three_way(name, ours[name], stock[name], exact[name], run.dtype)


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
