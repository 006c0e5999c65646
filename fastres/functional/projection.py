"""The projection shortcut on its own: a strided 1x1 convolution and its batch norm.

Source: He et al. (2015), section 3.3, options B and C. Inside a block it is part of the block's operator; this unit
serves networks that keep the shortcut apart. Gram-folded, nothing of the output's size is saved for backward; in the
stored form, the raw conv output is. `plan.resolve_projection` says when.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.reference._common import acc_dtype

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, finalize, flatten, fold, needed, state_grads
from ._checks import check_rows, output_size, prepare_input
from ._library import ForwardOps, cast, define, nchw, nhwc, parameter_grads, refuse_double_backward, weight_grad


class Config(NamedTuple):
    stride: int
    bn: BatchNormConfig
    backend: str


def _forward(
    x: Tensor, weight: Tensor, bns: list[BatchNormParams], geometry: list[int], backend: str
) -> tuple[Tensor | None, ...]:
    (stride,) = geometry
    shape = _output_shape(x, weight, stride)
    k = plan.resolve_projection(x, shape, backend)
    w = weight.flatten(1)
    if not k.gram_folding:
        y, _ = k.conv1x1(x, w, stride, False)
        bn = finalize(k, bns[0], k.channel_stats(y) if bns[0].batch_stats else None, x.dtype)
        return k.bn_act(y, bn, relu=False), y, bn, None, None
    moments = k.projection_gram(x, stride) if bns[0].batch_stats else None
    bn, mean, scatter = fold(k, bns[0], moments, math.prod(shape[:3]), w)
    return k.projection_fprop(x, w, bn, stride), None, bn, mean, scatter


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bn: Tensor,
    mean: Tensor | None,
    scatter: Tensor | None,
    batch_stats: bool,
    needs: list[bool],
    geometry: list[int],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """dx, dW (in acc) and `grad` `[4, K]`; needs: x, weight, gamma or beta. y: None from the Gram-folded form."""
    k = plan.resolve_projection(x, g.shape, backend)
    (stride,) = geometry
    need_x, need_w, need_bn = needs
    w = weight.flatten(1)
    rows = g.shape[:3].numel()
    dx = dw = grad = None
    if y is None:
        p, sum_g = k.projection_wgrad(g, x, stride)
        dw, grad, u, v, c, v_scale, d = k.gram_bwd(p, sum_g, w, bn, rows, mean, scatter)
        if need_x:
            dx = torch.zeros_like(x)
            k.projection_dgrad(dx, g, x, u, v, c, stride, v_scale=v_scale, d=d)
    else:
        if need_bn or batch_stats:
            grad = k.bn_bwd_finalize(k.bn_bwd_reduce(g, y, bn)[0], bn, rows if batch_stats else None)
        if need_x or need_w:
            dy, _ = k.bn_bwd_apply(g, y if batch_stats else None, bn, grad)
        if need_w:
            dw = k.conv1x1_wgrad(x, dy, stride)
        if need_x:
            dx = k.conv1x1_dgrad(dy, w, x.shape[1:3], stride)
    return dx, weight_grad(dw, weight) if need_w else None, grad if need_bn else None


def _output_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    """NHWC shape of the output for an NHWC x."""
    n, h, w, _ = x.shape
    return n, output_size(h, 1, stride, 0, 1), output_size(w, 1, stride, 0, 1), weight.shape[0]


def _forward_fake(x, weight, bns, geometry, backend):
    c = x.shape[3]
    shape = _output_shape(x, weight, *geometry)
    out = x.new_empty(shape)
    bn = x.new_empty(4, weight.shape[0], dtype=acc_dtype(x.dtype))
    if not plan.resolve_projection(x, shape, backend).gram_folding:
        return out, torch.empty_like(out), bn, None, None
    moments = (bn.new_empty(c), bn.new_empty(c, c)) if bns[0].batch_stats else (None, None)
    return out, None, bn, *moments


def _backward_fake(g, x, weight, y, bn, mean, scatter, batch_stats, needs, geometry, backend):
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight, dtype=bn.dtype) if needs[1] else None,
        torch.empty_like(bn) if needs[2] else None,
    )


_forward_ops = ForwardOps(
    "projection",
    "Tensor x, Tensor weight",
    "Tensor out, Tensor y, Tensor bn, Tensor mean, Tensor scatter",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "projection_bwd",
    "(Tensor g, Tensor x, Tensor weight, Tensor? y, Tensor bn, Tensor? mean, Tensor? scatter, bool batch_stats, "
    "bool[] needs, int[] geometry, str backend) -> (Tensor dx, Tensor dw, Tensor grad)",
    _backward,
    _backward_fake,
)


class ProjectionFunction(torch.autograd.Function):
    """`projection` for autograd."""

    @staticmethod
    def forward(ctx, config: Config, x: Tensor, parameter: Tensor, *state: Tensor | None) -> Tensor:
        (weight,) = cast([parameter], x.dtype)
        out, *saved = _forward_ops((nhwc(x), weight), config.bn, state, [config.stride], config.backend)
        ctx.config = config
        ctx.state_dtypes = [None if tensor is None else tensor.dtype for tensor in state]
        ctx.save_for_backward(x, parameter, weight, *saved)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        config = ctx.config
        x, parameter, weight, *saved = ctx.saved_tensors
        _, need_x, need_w, *need_state = ctx.needs_input_grad
        with torch.no_grad():
            dx, dw, grad = _backward_op(
                nhwc(g), nhwc(x), weight, *saved, config.bn.batch_stats[0], [need_x, need_w, *needed(need_state)],
                [config.stride], config.backend,
            )  # fmt: skip
            grads = [None if dx is None else nchw(dx), *parameter_grads([dw], [parameter])]
            grads += state_grads([grad], ctx.state_dtypes, need_state)
        return None, *refuse_double_backward(grads, g, x, parameter)


def projection(
    x: Tensor, conv_weight: Tensor, bn: BatchNormParams, *, stride: int = 1, backend: str = "auto"
) -> Tensor:
    """BN(conv(x)) with a 1x1 conv that reads every `stride`-th pixel, fused.

    Args:
        x: `[N, C, H, W]`; channels_last memory is taken as it is, other memory is converted once.
        conv_weight: `[K, C, 1, 1]`.
        bn: the batch norm; running statistics are updated in place.
        backend: one of `fastres.backends.CHOICES`.

    Returns:
        `[N, K, Ho, Wo]` in channels_last memory, Ho = (H - 1)//stride + 1, in x's dtype or autocast's.

    Raises:
        As `fastres.functional.bottleneck`.
    """
    x = prepare_input("projection", x, conv_weight)
    n, h, w, c = _output_shape(x.permute(0, 2, 3, 1), conv_weight, stride)
    check_rows(bn, (n, c, h, w))
    config, state = flatten([bn])
    return ProjectionFunction.apply(Config(stride, config, backend), x, conv_weight, *state)
