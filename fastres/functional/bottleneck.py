"""The bottleneck block: 1x1, 3x3 and 1x1 convolutions, each with batch norm, a shortcut and ReLUs.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), figure 5 right and section 3.3. Forward and
backward are the lists of kernel calls that docs/arithmetic.md derives. The last conv is Gram-folded: its raw output,
the widest tensor of the block, is never formed. Saved for backward are x, y1, y2, out and small float32 matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, finalize, flatten, fold, needed, state_grads
from ._checks import check_identity, check_rows, check_shortcut, output_size, prepare_input
from ._library import ForwardOps, define, nchw, nhwc, refuse_double_backward, weight_grads


class Geometry(NamedTuple):
    """stride_1x1 and stride_3x3: of the first and the second conv; the projection's is their product."""

    stride_1x1: int
    stride_3x3: int
    dilation: int
    groups: int

    @property
    def stride(self) -> int:
        return self.stride_1x1 * self.stride_3x3


class Config(NamedTuple):
    geometry: Geometry
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
    shape = Geometry(*geometry)
    w1, w2, w3, *rest = (weight.to(x.dtype) for weight in weights)
    w1, w3 = w1.flatten(1), w3.flatten(1)
    y1, stats = k.conv1x1(x, w1, shape.stride_1x1, bns[0].batch_stats)
    bn1 = finalize(k, bns[0], stats, x.dtype)
    a1 = k.bn_act(y1, bn1)
    y2, stats = k.conv3x3(a1, w2, shape.stride_3x3, shape.dilation, shape.groups, bns[1].batch_stats)
    bn2 = finalize(k, bns[1], stats, x.dtype)
    del a1
    rows = y2.shape[:3].numel()
    bn3, mean3, scatter3 = fold(k, bns[2], k.gram(y2, bn2) if bns[2].batch_stats else None, rows, w3)
    bn_p = mean_p = scatter_p = None
    if rest:
        w_p = rest[0].flatten(1)
        moments = k.projection_gram(x, shape.stride) if bns[3].batch_stats else None
        bn_p, mean_p, scatter_p = fold(k, bns[3], moments, rows, w_p)
        shortcut = k.projection_fprop(x, w_p, bn_p, shape.stride)
    out = k.expand(y2, bn2, w3, bn3, x if shortcut is None else shortcut)
    return out, y1, y2, bn1, bn2, bn3, bn_p, mean3, scatter3, mean_p, scatter_p


def _backward(
    g: Tensor,
    x: Tensor,
    weights: list[Tensor],
    out: Tensor,
    y1: Tensor,
    y2: Tensor,
    bn1: Tensor,
    bn2: Tensor,
    bn3: Tensor,
    bn_p: Tensor | None,
    mean3: Tensor | None,
    scatter3: Tensor | None,
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
    shape = Geometry(*geometry)
    count = len(weights)
    need_x, need_shortcut, *need = needs
    need_w, need_bn = need[:count], need[count:]
    need_1 = need_x or need_w[0] or need_bn[0]
    need_2 = need_1 or need_w[1] or need_bn[1]
    w1, w2, w3, *rest = (weight.to(x.dtype) for weight in weights)
    w1, w3 = w1.flatten(1), w3.flatten(1)
    rows1, rows2 = y1.shape[:3].numel(), y2.shape[:3].numel()
    dx = dw1 = dw2 = dw_p = grad1 = grad2 = grad_p = None

    p, sum_g, g = k.expand_wgrad(g, out, y2, bn2)
    dw3, grad3, u, v, c = k.gram_bwd(p, sum_g, w3, bn3, rows2, mean3, scatter3)
    if need_2:
        g2, sums = k.expand_dgrad(g, u, v, c, y2, bn2)
        grad2 = k.bn_bwd_finalize(sums, bn2, rows2 if batch_stats[1] else None)
    if need_1 or need_w[1]:
        dy2, _ = k.bn_bwd_apply(g2, y2 if batch_stats[1] else None, bn2, grad2)
        del g2
    if need_w[1]:
        dw2 = k.conv3x3_wgrad(y1, dy2, shape.stride_3x3, shape.dilation, shape.groups, bn1)
    if need_1:
        conv = shape.stride_3x3, shape.dilation, shape.groups
        g1, sums = k.conv3x3_dgrad(dy2, w2, y1.shape[1:3], *conv, y=y1, bn=bn1)
        grad1 = k.bn_bwd_finalize(sums, bn1, rows1 if batch_stats[0] else None)
        del dy2
    raw1 = y1 if batch_stats[0] else None
    if need_w[0]:
        dw1 = k.conv1x1_wgrad(x, g1, bn1, grad1, y=raw1, stride=shape.stride_1x1)
    if need_x:
        residual = g if identity else None
        hw = x.shape[1:3]
        dx = k.conv1x1_dgrad(g1, w1, bn1, grad1, hw, y=raw1, residual=residual, stride=shape.stride_1x1)
    if rest and (need_x or need_w[3] or need_bn[3]):
        p = k.projection_wgrad(g, x, shape.stride)
        dw_p, grad_p, u, v, c = k.gram_bwd(p, sum_g, rest[0].flatten(1), bn_p, rows2, mean_p, scatter_p)
        if need_x:
            k.projection_dgrad(dx, g, x, u, v, c, shape.stride)
    return (
        dx,
        g if need_shortcut else None,
        *weight_grads((dw1, dw2, dw3, dw_p), weights, need_w),
        grad1,
        grad2,
        grad3,
        grad_p,
    )


def _output_shapes(x: Tensor, weights: list[Tensor], shape: Geometry) -> tuple[tuple[int, ...], ...]:
    """NHWC shapes of y1, y2 and out for an NHWC x."""
    n, h, w, _ = x.shape
    h1, w1 = (output_size(size, 1, shape.stride_1x1, 0, 1) for size in (h, w))
    h2, w2 = (output_size(size, 3, shape.stride_3x3, shape.dilation, shape.dilation) for size in (h1, w1))
    c1, c2, c3 = (weight.shape[0] for weight in weights[:3])
    return (n, h1, w1, c1), (n, h2, w2, c2), (n, h2, w2, c3)


def _forward_fake(x, weights, shortcut, bns, geometry, backend):
    y1, y2, out = _output_shapes(x, weights, Geometry(*geometry))
    wide = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    vectors = [wide.new_empty(4, weight.shape[0]) for weight in weights]
    moments = [
        (wide.new_empty(c), wide.new_empty(c, c)) if bn.batch_stats else (None, None)
        for bn, c in zip(bns[2:], (y2[3], x.shape[3])[: len(bns) - 2], strict=True)
    ]
    if len(weights) == 3:
        vectors.append(None)
        moments.append((None, None))
    return x.new_empty(out), x.new_empty(y1), x.new_empty(y2), *vectors, *moments[0], *moments[1]


def _backward_fake(g, x, weights, out, y1, y2, bn1, bn2, bn3, bn_p, *rest):
    need_x, need_shortcut, *need = rest[-3]
    need_w, need_bn = need[: len(weights)], need[len(weights) :]
    need_1 = need_x or need_w[0] or need_bn[0]
    need_2 = need_1 or need_w[1] or need_bn[1]
    need_p = bn_p is not None and (need_x or need_w[3] or need_bn[3])
    wanted = zip((x, out, *weights), (need_x, need_shortcut, *need_w), strict=True)
    grads = [torch.empty_like(like) if needed else None for like, needed in wanted]
    grads += [None] * (4 - len(weights))
    vectors = zip((bn1, bn2, bn3, bn_p), (need_1, need_2, True, need_p), strict=True)
    return *grads, *(torch.empty_like(bn) if needed else None for bn, needed in vectors)


_forward_ops = ForwardOps(
    "bottleneck",
    "Tensor x, Tensor[] weights, Tensor? shortcut",
    "Tensor out, Tensor y1, Tensor y2, Tensor bn1, Tensor bn2, Tensor bn3, Tensor bn_p, "
    "Tensor mean3, Tensor scatter3, Tensor mean_p, Tensor scatter_p",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "bottleneck_bwd",
    "(Tensor g, Tensor x, Tensor[] weights, Tensor out, Tensor y1, Tensor y2, Tensor bn1, Tensor bn2, Tensor bn3, "
    "Tensor? bn_p, Tensor? mean3, Tensor? scatter3, Tensor? mean_p, Tensor? scatter_p, bool[] batch_stats, "
    "bool identity, bool[] needs, int[] geometry, str backend) -> (Tensor dx, Tensor dshortcut, Tensor dw1, "
    "Tensor dw2, Tensor dw3, Tensor dw_p, Tensor grad1, Tensor grad2, Tensor grad3, Tensor grad_p)",
    _backward,
    _backward_fake,
)


class BottleneckFunction(torch.autograd.Function):
    """`bottleneck` for autograd. Tensors after `shortcut`: the conv weights, then `TENSORS` for each batch norm."""

    @staticmethod
    def forward(ctx, config: Config, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Tensor:
        count = len(config.bn.eps)
        weights, state = tensors[:count], tensors[count:]
        inputs = nhwc(x), weights, None if shortcut is None else nhwc(shortcut)
        out, *saved = _forward_ops(inputs, config.bn, state, config.geometry, config.backend)
        ctx.config = config
        ctx.identity = shortcut is None and count == 3
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
                list(config.geometry), config.backend,
            )  # fmt: skip
            grads = [None if grad is None else nchw(grad) for grad in (dx, dshortcut)]
            grads += [*rest[:count], *state_grads(rest[4 : 4 + count], ctx.state_dtypes, need_state)]
        return None, *refuse_double_backward(grads, g, x, *weights)


def bottleneck(
    x: Tensor,
    conv1_weight: Tensor,
    bn1: BatchNormParams,
    conv2_weight: Tensor,
    bn2: BatchNormParams,
    conv3_weight: Tensor,
    bn3: BatchNormParams,
    *,
    projection: tuple[Tensor, BatchNormParams] | None = None,
    shortcut: Tensor | None = None,
    stride: int = 1,
    stride_on_1x1: bool = False,
    dilation: int = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """relu(BN3(conv3(relu(BN2(conv2(relu(BN1(conv1(x)))))))) + shortcut), fused.

    Args:
        x: `[N, C, H, W]`; channels_last memory is taken as it is, other memory is converted once.
        conv1_weight: `[W1, C, 1, 1]`. conv2_weight: `[W2, W1/groups, 3, 3]`, padding = dilation.
            conv3_weight: `[K, W2, 1, 1]`.
        bn1, bn2, bn3: the batch norms after them; running statistics are updated in place.
        projection: `(weight, bn)` of a projection shortcut, `[K, C, 1, 1]` with the block's stride.
        shortcut: a ready-made shortcut `[N, K, Ho, Wo]` in place of x itself.
        stride: of the 3x3 conv, or with `stride_on_1x1`, as in the paper, of the first 1x1 conv.
        backend: one of `fastres.backends.CHOICES`.

    Returns:
        `[N, K, Ho, Wo]` in channels_last memory, in x's dtype or autocast's.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, and, as PyTorch does, for one value per
            channel in training. RuntimeError: when `backend` cannot run, and in double backward.
    """
    if projection is not None and shortcut is not None:
        raise ValueError("bottleneck: pass either projection or shortcut, not both")
    x = prepare_input("bottleneck", x, conv1_weight)
    geometry = Geometry(stride if stride_on_1x1 else 1, 1 if stride_on_1x1 else stride, dilation, groups)
    weights = [conv1_weight, conv2_weight, conv3_weight]
    bns = [bn1, bn2, bn3]
    if projection is not None:
        weights.append(projection[0])
        bns.append(projection[1])
    shapes = [(n, c, h, w) for n, h, w, c in _output_shapes(x.permute(0, 2, 3, 1), weights, geometry)]
    for params, shape in zip(bns, (*shapes, shapes[2])[: len(bns)], strict=True):
        check_rows(params, shape)
    if shortcut is not None:
        shortcut = check_shortcut("bottleneck", shortcut, shapes[2], x.dtype)
    elif projection is None:
        check_identity("bottleneck", x, shapes[2])
    config, state = flatten(bns)
    return BottleneckFunction.apply(Config(geometry, config, backend), x, shortcut, *weights, *state)
