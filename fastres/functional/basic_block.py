"""The basic block: two 3x3 convolutions, each with batch norm, a shortcut and ReLUs.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), figure 5 left. Forward and backward here are
the lists of kernel calls that docs/arithmetic.md derives. Saved for backward are x, y1, y2, out and of a projection
small float32 matrices, where it is Gram-folded, or its raw output (`k.fold_projection`). The form for convolutions that
fuse nothing is in `_residual.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from ._batch_norm import BatchNormParams, finalize, fold
from ._conv import Conv
from ._residual import (
    Block,
    Gradients,
    Layer,
    Moments,
    ResidualBlock,
    Saved,
    apply_to_both_branches,
    project,
    residual_block,
    sums_of_both_branches,
)


def _convs(weights: Sequence[Tensor], stride: int) -> list[Conv]:
    w1, w2, *projection = weights
    return [Conv(w1, stride), Conv(w2), *(Conv(w.flatten(1), stride) for w in projection)]


def _forward(
    k: SimpleNamespace,
    x: Tensor,
    convs: Sequence[Conv],
    bns: Sequence[BatchNormParams],
    projection: Conv | None,
    shortcut: Tensor | None,
) -> Saved:
    conv1, conv2 = convs
    y1, stats = k.conv3x3(x, conv1.weight, conv1.stride, with_stats=bns[0].batch_stats)
    bn1 = finalize(k, bns[0], stats, x.dtype)
    y2, stats = k.conv3x3(k.bn_act(y1, bn1), conv2.weight, with_stats=bns[1].batch_stats)
    bn2 = finalize(k, bns[1], stats, x.dtype)
    raw, vectors = [y1, y2], [bn1, bn2]
    if projection is None:
        return Saved(k.bn_act(y2, bn2, x if shortcut is None else shortcut), raw, vectors)
    if not k.fold_projection:
        y_p, bn_p = project(k, x, projection, bns[2])
        return Saved(k.bn_act(y2, bn2, y_p, bn_p), [*raw, y_p], [*vectors, bn_p])
    of_x = k.projection_gram(x, projection.stride) if bns[2].batch_stats else None
    bn_p, *found = fold(k, bns[2], of_x, y2.shape[:3].numel(), projection.weight)
    shortcut = k.projection_fprop(x, projection.weight, bn_p, projection.stride)
    return Saved(k.bn_act(y2, bn2, shortcut), [*raw, None], [*vectors, bn_p], moments_p=Moments(*found))


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
    first, second = layers
    y1, bn1 = first.y, first.bn
    need_1 = need_x or first.need
    need_p = projection is not None and (need_x or projection.need)
    folds_p = projection is not None and projection.y is None
    stored_p = None if folds_p else projection
    rows1, rows2 = y1.shape[:3].numel(), second.y.shape[:3].numel()
    dx = dw1 = dw2 = dw_p = grad1 = None

    # Both batch norms end at the same ReLU: a folded projection takes the sum of g from the other's.
    sums_for = second._replace(need_bn=True) if folds_p else second
    grad2, grad_p = sums_of_both_branches(k, g, out, sums_for, stored_p, True, need_p)
    need_residual = need_shortcut or need_p or (identity and need_x)
    # With a stored projection g is from here on the gradient of its raw output.
    dy2, g = apply_to_both_branches(k, g, out, second, stored_p, grad2, grad_p, need_residual)
    if second.need_weight:
        dw2 = k.conv3x3_wgrad(y1, dy2, bn=bn1)
    if need_1:
        g1, sums = k.conv3x3_dgrad(dy2, second.conv.weight, y1.shape[1:3], y=y1, bn=bn1)
        grad1 = k.bn_bwd_finalize(sums, bn1, rows1 if first.batch_stats else None)
    if need_x or first.need_weight:
        dy1, _ = k.bn_bwd_apply(g1, y1 if first.batch_stats else None, bn1, grad1)
    if first.need_weight:
        dw1 = first.conv.wgrad(k, x, dy1)
    if need_x:
        dx = first.conv.dgrad(k, dy1, x, g if identity else None, out is None, mask_input)
    if folds_p and need_p:
        weight, stride = projection.conv.weight, projection.conv.stride
        p, _ = k.projection_wgrad(g, x, stride, with_sum=False)
        small = p, grad2[1], weight, projection.bn, rows2, *projection.moments
        dw_p, grad_p, u, v, c, v_scale, d = k.gram_bwd(*small)
        if need_x:
            k.projection_dgrad(dx, g, x, u, v, c, stride, v_scale=v_scale, d=d)
    elif stored_p is not None:
        if stored_p.need_weight:
            dw_p = stored_p.conv.wgrad(k, x, g)
        if need_x:
            dx = stored_p.conv.dgrad(k, g, x, dx)
    weights, grads = [dw1, dw2], [grad1, grad2]
    if projection is not None:
        weights, grads = [*weights, dw_p], [*grads, grad_p]
    return Gradients(dx, g if need_shortcut else None, weights, grads)


ResidualBlock("basic_block", depth=2, folds_last=False, convs=_convs, forward=_forward, backward=_backward)


class BasicBlockParams(NamedTuple):
    """A basic block as `stage` takes it: what `basic_block` takes besides x, a ready-made shortcut and backend."""

    conv1_weight: Tensor
    bn1: BatchNormParams
    conv2_weight: Tensor
    bn2: BatchNormParams
    projection: tuple[Tensor, BatchNormParams] | None = None
    stride: int = 1

    def block(self) -> Block:
        weights, bns = [self.conv1_weight, self.conv2_weight], [self.bn1, self.bn2]
        return Block("basic_block", weights, bns, self.projection, (self.stride,))


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
    params = BasicBlockParams(conv1_weight, bn1, conv2_weight, bn2, projection, stride)
    return residual_block(params.block(), x, shortcut, backend)
