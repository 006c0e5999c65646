"""What a training step of a model moves and computes, and the shortest time that this takes."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres import plan
from fastres.conversion import convert, find_units, revert
from fastres.functional import _library
from fastres.parts import PARTS, Part

from .complete import Place, complete_bytes
from .counting import counting
from .traffic import Step, Traffic

SCHEMES = ("stock", "today", "complete")
"""stock: PyTorch's modules, eager, channels_last. today: the plan that `fastres.convert` runs on a GPU now. complete:
the plan when every kernel that is planned exists, modelled (`fastres.cost.complete`)."""


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
    places = _places(twin)
    traffic = Traffic(part)

    def wrap(k):
        if scheme != "complete":
            return counting(k, traffic)
        k = plan.in_form(k, gram_folding=True, fold_projection=True, one_pass=False)
        return counting(k, traffic, functools.partial(complete_bytes, places.get(traffic.unit, Place(True, True))))

    def expand(func):
        body = _library.BODIES.get(func)
        if body is None:
            return None

        def run(*args):
            with plan.wrapping(wrap), plan.planning_for(part=part):
                return body(*args)

        return run

    traffic.expand = expand
    _follow(twin, list(places), traffic)
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


def _places(model: nn.Module) -> dict[str, Place]:
    """The blocks by path, and where each stands: neighbours under one parent make a stage."""
    paths = [unit.path for unit in find_units(model) if unit.path and unit.name != "stem"]
    stages = [path.rpartition(".")[0] for path in paths]
    return {
        path: Place(first=i == 0 or stages[i - 1] != stages[i], last=i + 1 == len(paths) or stages[i + 1] != stages[i])
        for i, path in enumerate(paths)
    }


def _follow(model: nn.Module, paths: list[str], traffic: Traffic) -> None:
    """Keep `traffic.unit` up to date, by hooks on the blocks and on the gradients of what goes in and out of them."""
    traffic.unit = "stem"

    def hooks(path: str):
        def at(unit: str):
            def enter(*_):
                traffic.unit = unit

            return enter

        def before(module, args):
            traffic.unit = path
            if args[0].requires_grad:
                # Where blocks follow each other this comes after the hook of the block in front, on the same tensor.
                args[0].register_hook(lambda grad: leave())

        def leave():
            if traffic.unit == path:
                traffic.unit = "stem"

        def after(module, args, output):
            traffic.unit = "head"
            if output.requires_grad:
                output.register_hook(at(path))

        return before, after

    for path in paths:
        before, after = hooks(path)
        module = model.get_submodule(path)
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
