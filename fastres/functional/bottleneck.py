"""The bottleneck block: 1x1, 3x3 and 1x1 convolutions, each with batch norm, a shortcut and ReLUs.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), figure 5 right and section 3.3. Forward and
backward here are the Gram-folded lists of kernel calls that docs/arithmetic.md derives: the raw output of the last
conv, the widest tensor of the block, is never formed. Saved for backward are x, y1, y2, out and small float32 matrices.
A projection shortcut is Gram-folded too and multiplied inside `expand`, or its raw output is stored, as the plan says
(`fold_projection`). The form that stores all raw outputs is in `_residual.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from ._batch_norm import BatchNormParams, finalize, fold
from ._conv import Conv
from ._residual import Block, Gradients, Layer, Moments, ResidualBlock, Saved, project, residual_block


def _convs(weights: Sequence[Tensor], stride_1x1: int, stride_3x3: int, dilation: int, groups: int) -> list[Conv]:
    """stride_1x1 and stride_3x3: of the first and the second conv; the projection's is their product."""
    w1, w2, w3, *projection = weights
    main = [Conv(w1.flatten(1), stride_1x1), Conv(w2, stride_3x3, dilation, groups), Conv(w3.flatten(1))]
    return main + [Conv(w.flatten(1), stride_1x1 * stride_3x3) for w in projection]


def _forward(
    k: SimpleNamespace,
    x: Tensor,
    convs: Sequence[Conv],
    bns: Sequence[BatchNormParams],
    projection: Conv | None,
    shortcut: Tensor | None,
) -> Saved:
    conv1, conv2, conv3 = convs
    y1, stats = k.conv1x1(x, conv1.weight, conv1.stride, bns[0].batch_stats)
    bn1 = finalize(k, bns[0], stats, x.dtype)
    a1 = k.bn_act(y1, bn1)
    y2, stats = k.conv3x3(a1, conv2.weight, *conv2.geometry, bns[1].batch_stats)
    bn2 = finalize(k, bns[1], stats, x.dtype)
    del a1
    rows = y2.shape[:3].numel()
    bn3, *moments = fold(k, bns[2], k.gram(y2, bn2) if bns[2].batch_stats else None, rows, conv3.weight)
    raw, vectors, moments_p = [y1, y2, None], [bn1, bn2, bn3], Moments()
    if projection is None:
        out = k.expand(y2, bn2, conv3.weight, bn3, x if shortcut is None else shortcut)
    elif k.fold_projection:
        of_x = k.projection_gram(x, projection.stride) if bns[3].batch_stats else None
        bn_p, *found = fold(k, bns[3], of_x, rows, projection.weight)
        second = {"shortcut_bn": bn_p, "shortcut_weight": projection.weight, "stride": projection.stride}
        out = k.expand(y2, bn2, conv3.weight, bn3, x, **second)
        raw, vectors, moments_p = [*raw, None], [*vectors, bn_p], Moments(*found)
    else:
        y_p, bn_p = project(k, x, projection, bns[3])
        out = k.expand(y2, bn2, conv3.weight, bn3, y_p, shortcut_bn=bn_p)
        raw, vectors = [*raw, y_p], [*vectors, bn_p]
    return Saved(out, raw, vectors, Moments(*moments), moments_p)


def _backward(
    k: SimpleNamespace,
    g: Tensor,
    x: Tensor,
    out: Tensor | None,
    layers: Sequence[Layer],
    projection: Layer | None,
    identity: bool,
    mask_input: bool,
    need_x: bool,
    need_shortcut: bool,
) -> Gradients:
    first, second, third = layers
    (y1, bn1), (y2, bn2) = (first.y, first.bn), (second.y, second.bn)
    need_1 = need_x or first.need
    need_2 = need_1 or second.need
    rows1, rows2 = y1.shape[:3].numel(), y2.shape[:3].numel()
    dx = dw1 = dw2 = grad1 = grad2 = None

    of_x = {}
    if projection is not None and projection.y is None and (need_x or projection.need):
        of_x = {"x": x, "stride": projection.conv.stride}
    p, sum_g, g, p_x = k.expand_wgrad(g, out, y2, bn2, **of_x)
    small = p, sum_g, third.conv.weight, third.bn, rows2, *third.moments
    dw3, grad3, u, v, c, v_scale, d = k.gram_bwd(*small)
    if need_2:
        g2, sums = k.expand_dgrad(g, u, v, c, y2, bn2, v_scale, d)
        grad2 = k.bn_bwd_finalize(sums, bn2, rows2 if second.batch_stats else None)
    if need_1 or second.need_weight:
        dy2, _ = k.bn_bwd_apply(g2, y2 if second.batch_stats else None, bn2, grad2)
        del g2
    if second.need_weight:
        dw2 = k.conv3x3_wgrad(y1, dy2, *second.conv.geometry, bn1)
    if need_1:
        g1, sums = k.conv3x3_dgrad(dy2, second.conv.weight, y1.shape[1:3], *second.conv.geometry, y=y1, bn=bn1)
        grad1 = k.bn_bwd_finalize(sums, bn1, rows1 if first.batch_stats else None)
        del dy2
    formed = {"bn": bn1, "grad": grad1, "y": y1 if first.batch_stats else None}
    # Without out, g is what the operator was given.
    added = {"residual": g if identity else None, "keep_residual": out is None}
    if need_x and first.need_weight and first.conv.stride == 1 and k.one_pass:
        dx, dw1 = k.conv1x1_bwd(x, g1, first.conv.weight, **formed, **added, mask=mask_input)
    else:
        if first.need_weight:
            dw1 = k.conv1x1_wgrad(x, g1, first.conv.stride, **formed)
        if need_x:
            hw, mask = x.shape[1:3], x if mask_input else None
            dx = k.conv1x1_dgrad(g1, first.conv.weight, hw, first.conv.stride, **formed, **added, mask=mask)
    weights, grads = [dw1, dw2, dw3], [grad1, grad2, grad3]
    if projection is not None:
        if projection.y is None:
            dx, dw_p, grad_p = _folded_projection(k, g, sum_g, p_x, x, dx, projection, need_x)
        else:
            dx, dw_p, grad_p = _stored_projection(k, g, x, dx, projection, need_x)
        weights, grads = [*weights, dw_p], [*grads, grad_p]
    return Gradients(dx, g if need_shortcut else None, weights, grads)


def _folded_projection(
    k: SimpleNamespace,
    g: Tensor,
    sum_g: Tensor,
    p_x: Tensor | None,
    x: Tensor,
    dx: Tensor | None,
    projection: Layer,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx with the projection's part, dW and `grad`, from the masked gradient and its products."""
    if p_x is None:
        return dx, None, None
    conv, rows = projection.conv, g.shape[:3].numel()
    dw, grad, u, v, c, v_scale, d = k.gram_bwd(p_x, sum_g, conv.weight, projection.bn, rows, *projection.moments)
    if need_x:
        k.projection_dgrad(dx, g, x, u, v, c, conv.stride, v_scale=v_scale, d=d)
    return dx, dw, grad


def _stored_projection(
    k: SimpleNamespace,
    g: Tensor,
    x: Tensor,
    dx: Tensor | None,
    projection: Layer,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `_folded_projection`, from the projection's raw output."""
    conv, bn, rows = projection.conv, projection.bn, g.shape[:3].numel()
    dw = grad = None
    if projection.need_bn or (projection.batch_stats and (need_x or projection.need_weight)):
        sums, _ = k.bn_bwd_reduce(g, projection.y, bn)
        grad = k.bn_bwd_finalize(sums, bn, rows if projection.batch_stats else None)
    formed = {"bn": bn, "grad": grad, "y": projection.y if projection.batch_stats else None}
    if projection.need_weight:
        dw = k.conv1x1_wgrad(x, g, conv.stride, **formed)
    if need_x:
        dx = k.conv1x1_dgrad(g, conv.weight, x.shape[1:3], conv.stride, **formed, residual=dx)
    return dx, dw, grad


ResidualBlock("bottleneck", depth=3, folds_last=True, convs=_convs, forward=_forward, backward=_backward)


class BottleneckParams(NamedTuple):
    """A bottleneck block as `stage` takes it: what `bottleneck` takes besides x, a ready-made shortcut and backend."""

    conv1_weight: Tensor
    bn1: BatchNormParams
    conv2_weight: Tensor
    bn2: BatchNormParams
    conv3_weight: Tensor
    bn3: BatchNormParams
    projection: tuple[Tensor, BatchNormParams] | None = None
    stride: int = 1
    stride_on_1x1: bool = False
    dilation: int = 1
    groups: int = 1

    def block(self) -> Block:
        weights = [self.conv1_weight, self.conv2_weight, self.conv3_weight]
        bns = [self.bn1, self.bn2, self.bn3]
        strides = (self.stride, 1) if self.stride_on_1x1 else (1, self.stride)
        return Block("bottleneck", weights, bns, self.projection, (*strides, self.dilation, self.groups))


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
    params = BottleneckParams(
        conv1_weight, bn1, conv2_weight, bn2, conv3_weight, bn3, projection, stride, stride_on_1x1, dilation, groups
    )
    return residual_block(params.block(), x, shortcut, backend)
