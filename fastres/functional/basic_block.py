"""The basic block: two 3x3 convolutions, each with batch norm, a shortcut and ReLUs.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), figure 5 left. Saved for backward are x, y1,
y2, out and small float32 matrices; docs/arithmetic.md derives the steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, finalize, flatten, fold, needed, state_grads
from ._checks import check_identity, check_rows, check_shortcut, output_size, prepare_input
from ._library import ForwardOps, define, nchw, nhwc, refuse_double_backward, weight_grads


class Config(NamedTuple):
    stride: int
    bn: BatchNormConfig
    backend: str


def _forward(
    x: Tensor,
    weights: list[Tensor],
    shortcut: Tensor | None,
    bns: list[BatchNormParams],
    geometry: list[int],
    backend: str,
) -> tuple[Tensor | None, ...]:
    k = plan.resolve(x.dtype, x.device, backend)
    (stride,) = geometry
    w1, w2, *rest = (weight.to(x.dtype) for weight in weights)
    y1, stats = k.conv3x3(x, w1, stride, with_stats=bns[0].batch_stats)
    bn1 = finalize(k, bns[0], stats, x.dtype)
    y2, stats = k.conv3x3(k.bn_act(y1, bn1), w2, with_stats=bns[1].batch_stats)
    bn2 = finalize(k, bns[1], stats, x.dtype)
    bn_p = mean_p = scatter_p = None
    if rest:
        w_p = rest[0].flatten(1)
        moments = k.projection_gram(x, stride) if bns[2].batch_stats else None
        bn_p, mean_p, scatter_p = fold(k, bns[2], moments, y2.shape[:3].numel(), w_p)
        shortcut = k.projection_fprop(x, w_p, bn_p, stride)
    out = k.bn_act(y2, bn2, x if shortcut is None else shortcut)
    return out, y1, y2, bn1, bn2, bn_p, mean_p, scatter_p


def _backward(
    g: Tensor,
    x: Tensor,
    weights: list[Tensor],
    out: Tensor,
    y1: Tensor,
    y2: Tensor,
    bn1: Tensor,
    bn2: Tensor,
    bn_p: Tensor | None,
    mean_p: Tensor | None,
    scatter_p: Tensor | None,
    batch_stats: list[bool],
    identity: bool,
    needs: list[bool],
    geometry: list[int],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the shortcut and the weights, and `grad` `[4, C]` of each batch norm; None where not needed.

    needs: x, shortcut, then the weights, then for each batch norm whether gamma or beta need theirs.
    """
    k = plan.resolve(x.dtype, x.device, backend)
    (stride,) = geometry
    count = len(weights)
    need_x, need_shortcut, *need = needs
    need_w, need_bn = need[:count], need[count:]
    need_1 = need_x or need_w[0] or need_bn[0]
    need_p = bn_p is not None and (need_x or need_w[2] or need_bn[2])
    w1, w2, *rest = (weight.to(x.dtype) for weight in weights)
    rows1, rows2 = y1.shape[:3].numel(), y2.shape[:3].numel()
    dx = dw1 = dw2 = dw_p = grad1 = grad_p = None

    sums, _ = k.bn_bwd_reduce(g, y2, bn2, out=out)
    grad2 = k.bn_bwd_finalize(sums, bn2, rows2 if batch_stats[1] else None)
    need_residual = need_shortcut or need_p or (identity and need_x)
    raw2 = y2 if batch_stats[1] else None
    dy2, g = k.bn_bwd_apply(g, raw2, bn2, grad2, out=out, need_residual=need_residual)
    if need_w[1]:
        dw2 = k.conv3x3_wgrad(y1, dy2, bn=bn1)
    if need_1:
        g1, sums = k.conv3x3_dgrad(dy2, w2, y1.shape[1:3], y=y1, bn=bn1)
        grad1 = k.bn_bwd_finalize(sums, bn1, rows1 if batch_stats[0] else None)
    if need_x or need_w[0]:
        dy1, _ = k.bn_bwd_apply(g1, y1 if batch_stats[0] else None, bn1, grad1)
    if need_w[0]:
        dw1 = k.conv3x3_wgrad(x, dy1, stride)
    if need_x:
        dx, _ = k.conv3x3_dgrad(dy1, w1, x.shape[1:3], stride, residual=g if identity else None)
    if need_p:
        p = k.projection_wgrad(g, x, stride)
        # dbeta of the main branch: both batch norms end at the same ReLU and share g and its sum.
        dw_p, grad_p, u, v, c = k.gram_bwd(p, grad2[1], rest[0].flatten(1), bn_p, rows2, mean_p, scatter_p)
        if need_x:
            k.projection_dgrad(dx, g, x, u, v, c, stride)
    return (
        dx,
        g if need_shortcut else None,
        *weight_grads((dw1, dw2, dw_p), weights, need_w),
        grad1,
        grad2,
        grad_p,
    )


def _output_shapes(x: Tensor, weights: list[Tensor], stride: int) -> tuple[tuple[int, ...], ...]:
    """NHWC shapes of y1 and of y2 (which is out's) for an NHWC x."""
    n, h, w, _ = x.shape
    ho, wo = (output_size(size, 3, stride, 1, 1) for size in (h, w))
    return (n, ho, wo, weights[0].shape[0]), (n, ho, wo, weights[1].shape[0])


def _forward_fake(x, weights, shortcut, bns, geometry, backend):
    y1, y2 = _output_shapes(x, weights, *geometry)
    wide = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    vectors = [wide.new_empty(4, weight.shape[0]) for weight in weights]
    c = x.shape[3]
    moments = (wide.new_empty(c), wide.new_empty(c, c)) if len(bns) == 3 and bns[2].batch_stats else (None, None)
    if len(weights) == 2:
        vectors.append(None)
    return x.new_empty(y2), x.new_empty(y1), x.new_empty(y2), *vectors, *moments


def _backward_fake(g, x, weights, out, y1, y2, bn1, bn2, bn_p, *rest):
    need_x, need_shortcut, *need = rest[-3]
    need_w, need_bn = need[: len(weights)], need[len(weights) :]
    need_1 = need_x or need_w[0] or need_bn[0]
    need_p = bn_p is not None and (need_x or need_w[2] or need_bn[2])
    wanted = zip((x, out, *weights), (need_x, need_shortcut, *need_w), strict=True)
    grads = [torch.empty_like(like) if needed else None for like, needed in wanted]
    grads += [None] * (3 - len(weights))
    vectors = zip((bn1, bn2, bn_p), (need_1, True, need_p), strict=True)
    return *grads, *(torch.empty_like(bn) if needed else None for bn, needed in vectors)


_forward_ops = ForwardOps(
    "basic_block",
    "Tensor x, Tensor[] weights, Tensor? shortcut",
    "Tensor out, Tensor y1, Tensor y2, Tensor bn1, Tensor bn2, Tensor bn_p, Tensor mean_p, Tensor scatter_p",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "basic_block_bwd",
    "(Tensor g, Tensor x, Tensor[] weights, Tensor out, Tensor y1, Tensor y2, Tensor bn1, Tensor bn2, Tensor? bn_p, "
    "Tensor? mean_p, Tensor? scatter_p, bool[] batch_stats, bool identity, bool[] needs, int[] geometry, str backend) "
    "-> (Tensor dx, Tensor dshortcut, Tensor dw1, Tensor dw2, Tensor dw_p, Tensor grad1, Tensor grad2, Tensor grad_p)",
    _backward,
    _backward_fake,
)


class BasicBlockFunction(torch.autograd.Function):
    """`basic_block` for autograd. Tensors after `shortcut`: the conv weights, then `TENSORS` for each batch norm."""

    @staticmethod
    def forward(ctx, config: Config, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Tensor:
        count = len(config.bn.eps)
        weights, state = tensors[:count], tensors[count:]
        inputs = nhwc(x), weights, None if shortcut is None else nhwc(shortcut)
        out, *saved = _forward_ops(inputs, config.bn, state, [config.stride], config.backend)
        ctx.config = config
        ctx.identity = shortcut is None and count == 2
        ctx.state_dtypes = [None if tensor is None else tensor.dtype for tensor in state]
        ctx.save_for_backward(x, *weights, out, *saved)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        config = ctx.config
        count = len(config.bn.eps)
        x, *saved = ctx.saved_tensors
        weights, out, saved = saved[:count], saved[count], saved[count + 1 :]
        _, need_x, need_shortcut, *need = ctx.needs_input_grad
        need_state = need[count:]
        needs = [need_x, need_shortcut, *need[:count], *needed(need_state)]
        with torch.no_grad():
            dx, dshortcut, *rest = _backward_op(
                nhwc(g), nhwc(x), weights, nhwc(out), *saved, list(config.bn.batch_stats), ctx.identity, needs,
                [config.stride], config.backend,
            )  # fmt: skip
            grads = [None if grad is None else nchw(grad) for grad in (dx, dshortcut)]
            grads += [*rest[:count], *state_grads(rest[3 : 3 + count], ctx.state_dtypes, need_state)]
        return None, *refuse_double_backward(grads, g, x, *weights)


def basic_block(
    x: Tensor,
    conv1_weight: Tensor,
    bn1: BatchNormParams,
    conv2_weight: Tensor,
    bn2: BatchNormParams,
    *,
    projection: tuple[Tensor, BatchNormParams] | None = None,
    shortcut: Tensor | None = None,
    stride: int = 1,
    backend: str = "auto",
) -> Tensor:
    """relu(BN2(conv2(relu(BN1(conv1(x))))) + shortcut), fused.

    Args:
        x: `[N, C, H, W]`; channels_last memory is taken as it is, other memory is converted once.
        conv1_weight: `[W, C, 3, 3]`, with the block's stride and padding 1. conv2_weight: `[K, W, 3, 3]`.
        bn1, bn2: the batch norms after them; running statistics are updated in place.
        projection: `(weight, bn)` of a projection shortcut, `[K, C, 1, 1]` with the block's stride.
        shortcut: a ready-made shortcut `[N, K, Ho, Wo]` in place of x itself.
        backend: one of `fastres.backends.CHOICES`.

    Returns:
        `[N, K, Ho, Wo]` in channels_last memory, in x's dtype or autocast's.

    Raises:
        As `fastres.functional.bottleneck`.
    """
    if projection is not None and shortcut is not None:
        raise ValueError("basic_block: pass either projection or shortcut, not both")
    x = prepare_input("basic_block", x, conv1_weight)
    weights = [conv1_weight, conv2_weight]
    bns = [bn1, bn2]
    if projection is not None:
        weights.append(projection[0])
        bns.append(projection[1])
    shapes = [(n, c, h, w) for n, h, w, c in _output_shapes(x.permute(0, 2, 3, 1), weights, stride)]
    for params, shape in zip(bns, (*shapes, shapes[1])[: len(bns)], strict=True):
        check_rows(params, shape)
    if shortcut is not None:
        shortcut = check_shortcut("basic_block", shortcut, shapes[1], x.dtype)
    elif projection is None:
        check_identity("basic_block", x, shapes[1])
    config, state = flatten(bns)
    return BasicBlockFunction.apply(Config(stride, config, backend), x, shortcut, *weights, *state)
