"""How a batch norm's parameters and state reach a fused unit, and what the unit does with them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

CUMULATIVE = -1.0
"""What an operator's schema, which has no optional floats in lists, says for momentum=None."""

TENSORS = 5
"""Tensors of one batch norm among an autograd.Function's flat arguments: gamma, beta, two running ones, counter."""


class BatchNormParams(NamedTuple):
    """One `torch.nn.BatchNorm2d`, as a fused unit needs it.

    weight, bias: gamma and beta `[C]`, or None. running_mean, running_var `[C]`, num_batches_tracked `[]` int64.
    batch_stats: True takes the statistics of the batch and updates the running ones in place where they are not None;
    False takes the running ones as constants. momentum: None for the cumulative average. eps: added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    batch_stats: bool
    momentum: float | None
    eps: float


class BatchNormConfig(NamedTuple):
    """The Python constants of a unit's batch norms, in order: what `BatchNormParams` holds besides tensors."""

    batch_stats: tuple[bool, ...]
    momentum: tuple[float | None, ...]
    eps: tuple[float, ...]


def flatten(bns: Sequence[BatchNormParams]) -> tuple[BatchNormConfig, list[Tensor | None]]:
    """Constants and the flat tensors, `TENSORS` for each batch norm."""
    config = BatchNormConfig(
        tuple(bn.batch_stats for bn in bns), tuple(bn.momentum for bn in bns), tuple(bn.eps for bn in bns)
    )
    return config, [tensor for bn in bns for tensor in bn[:TENSORS]]


TRAIN_SCHEMA = (
    "Tensor?[] affine, Tensor?[] constants, Tensor(a!)[] running_mean, Tensor(b!)[] running_var, "
    "Tensor(c!)[] num_batches_tracked, bool[] tracked, bool[] counted, bool[] batch_stats, float[] momentum, "
    "float[] eps"
)
CONST_SCHEMA = "Tensor?[] affine, Tensor?[] constants, float[] eps"


def train_args(config: BatchNormConfig, flat: Sequence[Tensor | None]) -> tuple:
    """The arguments of `TRAIN_SCHEMA`: the mutated lists hold only what this call updates."""
    affine, constants, running_mean, running_var, counters, tracked, counted = [], [], [], [], [], [], []
    for index, batch_stats in enumerate(config.batch_stats):
        weight, bias, mean, var, counter = flat[TENSORS * index : TENSORS * (index + 1)]
        affine += [weight, bias]
        constants += [None, None] if batch_stats else [mean, var]
        tracked.append(batch_stats and mean is not None)
        counted.append(tracked[-1] and counter is not None)
        if tracked[-1]:
            running_mean.append(mean)
            running_var.append(var)
        if counted[-1]:
            counters.append(counter)
    momentum = [CUMULATIVE if value is None else value for value in config.momentum]
    return (
        affine, constants, running_mean, running_var, counters, tracked, counted,
        list(config.batch_stats), momentum, list(config.eps),
    )  # fmt: skip


def const_args(config: BatchNormConfig, flat: Sequence[Tensor | None]) -> tuple:
    """The arguments of `CONST_SCHEMA`."""
    bns = range(len(config.eps))
    affine = [flat[TENSORS * i + j] for i in bns for j in (0, 1)]
    constants = [flat[TENSORS * i + j] for i in bns for j in (2, 3)]
    return affine, constants, list(config.eps)


def unpack_train(
    affine, constants, running_mean, running_var, num_batches_tracked, tracked, counted, batch_stats, momentum, eps
) -> list[BatchNormParams]:
    """The inverse of `train_args`."""
    means, variances, counters = iter(running_mean), iter(running_var), iter(num_batches_tracked)
    bns = []
    for i, from_batch in enumerate(batch_stats):
        mean, var = constants[2 * i : 2 * i + 2]
        if tracked[i]:
            mean, var = next(means), next(variances)
        counter = next(counters) if counted[i] else None
        factor = None if momentum[i] == CUMULATIVE else momentum[i]
        bns.append(BatchNormParams(*affine[2 * i : 2 * i + 2], mean, var, counter, from_batch, factor, eps[i]))
    return bns


def unpack_const(affine, constants, eps) -> list[BatchNormParams]:
    """The inverse of `const_args`."""
    return [
        BatchNormParams(*affine[2 * i : 2 * i + 2], *constants[2 * i : 2 * i + 2], None, False, None, value)
        for i, value in enumerate(eps)
    ]


def finalize(k: SimpleNamespace, params: BatchNormParams, stats, dtype: torch.dtype) -> Tensor:
    """`bn` `[4, C]` from the statistics of the batch, or from the constants where `stats` is None."""
    if stats is None:
        return k.bn_constants(params.running_mean, params.running_var, params.weight, params.bias, params.eps, dtype)
    return k.bn_finalize(stats, *params[:TENSORS], params.momentum, params.eps)


def fold(
    k: SimpleNamespace, params: BatchNormParams, moments, count: int, conv_weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(bn, mean, scatter)` of a 1x1 conv's output by Gram folding; `moments` None for constant statistics."""
    if moments is None:
        return finalize(k, params, None, conv_weight.dtype), None, None
    return k.gram_finalize(moments, count, conv_weight, *params[:TENSORS], params.momentum, params.eps)


def needed(needs_state: Sequence[bool]) -> list[bool]:
    """For each batch norm, whether gamma or beta needs a gradient; `needs_state` follows the flat tensors."""
    return [needs_state[i] or needs_state[i + 1] for i in range(0, len(needs_state), TENSORS)]


def state_grads(grads: Sequence[Tensor | None], flat_dtypes: Sequence, needs_state: Sequence[bool]) -> list:
    """Gradients of the flat tensors from each batch norm's `grad` `[4, C]` (rows 0 and 1), in their dtypes."""
    result: list[Tensor | None] = []
    for index, grad in enumerate(grads):
        first = TENSORS * index
        result += [grad[j].to(flat_dtypes[first + j]) if needs_state[first + j] else None for j in (0, 1)]
        result += [None] * (TENSORS - 2)
    return result
