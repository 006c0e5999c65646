"""What a training step of a model moves and computes, and the shortest time that this takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres import plan
from fastres.conversion import convert, find_units, revert
from fastres.functional import _library
from fastres.nn.stage import FusedStage
from fastres.parts import PARTS, Part

from .complete import complete_bytes
from .counting import counting
from .traffic import Step, Traffic, tensors

SCHEMES = ("stock", "today", "complete")
"""stock: PyTorch's modules, eager, channels_last. today: the plan that `fastres.convert` runs on a GPU now. complete:
every kernel in one pass and every projection folded, modelled (`fastres.cost.complete`)."""


def training_step(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    scheme: str = "today",
    part: Part = PARTS["h200"],
) -> list[Step]:
    """Every step of one forward and backward pass, in the order in which they run.

    The model runs on the meta device, in channels_last: nothing is computed, and the model given does not change.
    Convolutions and linear layers have weights of `dtype`, batch norms of float32. The loss is the cross entropy of
    `[N, classes]` outputs, the sum of others. Not counted: the optimizer, and autocast's copies of the weights.

    Args:
        model: any, converted or not; for the schemes "today" and "complete" a copy is converted.
        input_shape: `(N, C, H, W)`; a shape that does not fit raises what the model raises.
        dtype: of the activations. Raises ValueError when `part` has no figures for it.
        scheme: one of `SCHEMES`.
        part: the GPU whose floors the steps' seconds are.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is not known; use one of {', '.join(map(repr, SCHEMES))}")
    part.rate(dtype)
    twin = on_meta(model, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What runs as stock is counted as stock; `explain` says why.
        twin = revert(twin) if scheme == "stock" else convert(twin)
    traffic = Traffic(part)
    chained = _follow(twin, traffic)

    def wrap(k):
        if scheme != "complete":
            return counting(k, traffic)
        k = plan.in_form(k, gram_folding=True, fold_projection=True, one_pass=False)
        return counting(k, traffic, complete_bytes)

    def expand(func):
        body = _library.BODIES.get(func)
        if body is None:
            return None

        def run(*args):
            traffic.unit = next((chained[id(t)] for t in tensors(args) if id(t) in chained), traffic.unit)
            with plan.wrapping(wrap), plan.planning_for(part=part):
                return body(*args)

        return run

    traffic.expand = expand
    x = torch.empty(*input_shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    with traffic:
        loss = _loss(twin(x))
        traffic.direction = "backward"
        loss.backward()
    return traffic.steps


def on_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy without values, in training mode and channels_last; convolutions and linear layers have `dtype`."""
    memo = {id(t): torch.empty_like(t, device="meta") for t in (*model.parameters(), *model.buffers())}
    for t in model.parameters():
        memo[id(t)] = nn.Parameter(memo[id(t)], requires_grad=t.requires_grad)
    twin = copy.deepcopy(model, memo).train().to(memory_format=torch.channels_last)
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return twin


def _loss(output: Tensor) -> Tensor:
    if output.dim() != 2:
        return output.sum()
    return F.cross_entropy(output.float(), torch.empty(output.shape[0], dtype=torch.int64, device="meta"))


def _follow(model: nn.Module, traffic: Traffic) -> dict[int, str]:
    """Keep `traffic.unit` up to date, by hooks on the blocks and on the gradients of what goes in and out of them.

    A hook on a block of a chain would end the chain: there the hooks are on the stage. Which of the blocks an operator
    is for, its weights tell. Returns those, each with the path of its block.
    """
    traffic.unit = "stem"
    units = [unit for unit in find_units(model) if unit.path and unit.name != "stem"]
    chained: dict[int, str] = {}
    ends = {}
    for stage in (unit for unit in units if isinstance(unit.module, FusedStage)):
        runs = stage.module.runs()
        ends[stage.path] = tuple(f"{stage.path}.{run[i]}" for run, i in ((runs[0], 0), (runs[-1], -1)))
        for name in (name for run in runs if len(run) > 1 for name in run):
            path = f"{stage.path}.{name}"
            chained |= {id(weight): path for weight in model.get_submodule(path).parameters()}
    inside = set(chained.values())
    ends |= {unit.path: (unit.path, unit.path) for unit in units if unit.name != "stage" and unit.path not in inside}

    def hooks(first: str, last: str):
        def at(unit: str):
            def enter(*_):
                traffic.unit = unit

            return enter

        def before(module, args):
            traffic.unit = first
            if args[0].requires_grad:
                # Where blocks follow each other this comes after the hook of the block in front, on the same tensor.
                args[0].register_hook(lambda grad: leave())

        def leave():
            if traffic.unit == first:
                traffic.unit = "stem"

        def after(module, args, output):
            traffic.unit = "head"
            if output.requires_grad:
                output.register_hook(at(last))

        return before, after

    for path, (first, last) in ends.items():
        before, after = hooks(first, last)
        module = model.get_submodule(path)
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return chained
