"""The projection shortcut on its own: a strided 1x1 convolution and its batch norm, Gram-folded.

Source: He et al. (2015), section 3.3, options B and C. Inside a block it is part of the block's operator; this unit
serves networks that keep the shortcut apart. Nothing of the output's size is saved for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, flatten, fold, state_grads
from ._checks import check_rows, output_size, prepare_input
from ._library import ForwardOps, define, nchw, nhwc, refuse_double_backward, weight_grad


class Config(NamedTuple):
    stride: int
    bn: BatchNormConfig
    backend: str


def _forward(
    x: Tensor, weight: Tensor, bns: list[BatchNormParams], geometry: list[int], backend: str
) -> tuple[Tensor | None, ...]:
    k = plan.resolve(x.dtype, x.device, backend)
    (stride,) = geometry
    w = weight.to(x.dtype).flatten(1)
    n, ho, wo, _ = _output_shape(x, weight, stride)
    bn, mean, scatter = fold(k, bns[0], k.projection_gram(x, stride) if bns[0].batch_stats else None, n * ho * wo, w)
    return k.projection_fprop(x, w, bn, stride), bn, mean, scatter


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bn: Tensor,
    mean: Tensor | None,
    scatter: Tensor | None,
    needs: list[bool],
    geometry: list[int],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """dx, dW and `grad` `[4, K]`; needs: x, weight."""
    k = plan.resolve(x.dtype, x.device, backend)
    (stride,) = geometry
    need_x, need_w = needs
    p = k.projection_wgrad(g, x, stride)
    sum_g = g.sum((0, 1, 2), dtype=bn.dtype)
    rows = g.shape[:3].numel()
    dw, grad, u, v, c = k.gram_bwd(p, sum_g, weight.to(x.dtype).flatten(1), bn, rows, mean, scatter)
    dx = None
    if need_x:
        dx = torch.zeros_like(x)
        k.projection_dgrad(dx, g, x, u, v, c, stride)
    return dx, weight_grad(dw, weight) if need_w else None, grad


def _output_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    """NHWC shape of the output for an NHWC x."""
    n, h, w, _ = x.shape
    return n, output_size(h, 1, stride, 0, 1), output_size(w, 1, stride, 0, 1), weight.shape[0]


def _forward_fake(x, weight, bns, geometry, backend):
    c = x.shape[3]
    wide = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    moments = (wide.new_empty(c), wide.new_empty(c, c)) if bns[0].batch_stats else (None, None)
    return x.new_empty(_output_shape(x, weight, *geometry)), wide.new_empty(4, weight.shape[0]), *moments


def _backward_fake(g, x, weight, bn, mean, scatter, needs, geometry, backend):
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight) if needs[1] else None,
        torch.empty_like(bn),
    )


_forward_ops = ForwardOps(
    "projection",
    "Tensor x, Tensor weight",
    "Tensor out, Tensor bn, Tensor mean, Tensor scatter",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "projection_bwd",
    "(Tensor g, Tensor x, Tensor weight, Tensor bn, Tensor? mean, Tensor? scatter, bool[] needs, int[] geometry, "
    "str backend) -> (Tensor dx, Tensor dw, Tensor grad)",
    _backward,
    _backward_fake,
)


class ProjectionFunction(torch.autograd.Function):
    """`projection` for autograd."""

    @staticmethod
    def forward(ctx, config: Config, x: Tensor, weight: Tensor, *state: Tensor | None) -> Tensor:
        out, *saved = _forward_ops((nhwc(x), weight), config.bn, state, [config.stride], config.backend)
        ctx.config = config
        ctx.state_dtypes = [None if tensor is None else tensor.dtype for tensor in state]
        ctx.save_for_backward(x, weight, *saved)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        config = ctx.config
        x, weight, *saved = ctx.saved_tensors
        _, need_x, need_w, *need_state = ctx.needs_input_grad
        with torch.no_grad():
            dx, dw, grad = _backward_op(
                nhwc(g), nhwc(x), weight, *saved, [need_x, need_w], [config.stride], config.backend
            )
            grads = [None if dx is None else nchw(dx), dw, *state_grads([grad], ctx.state_dtypes, need_state)]
        return None, *refuse_double_backward(grads, g, x, weight)


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
