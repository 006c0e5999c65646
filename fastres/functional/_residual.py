"""What the residual blocks share: their operators, their autograd function, and the stored form.

A block is a chain of convolutions, each with its batch norm, a shortcut, and a ReLU behind their sum. It runs in one of
two forms, as the plan says (`gram_folding`):

- Gram-folded: the block's own lists of kernel calls (`bottleneck.py`, `basic_block.py`), in which the raw output of a
  1x1 conv that ends a branch is never formed, and kernels fuse what stands around the convolutions.
- Stored: the lists in this file. Convolutions fuse nothing, every raw conv output is stored, and between them stand the
  passes of the batch norm family. Forward: statistics, then BN + ReLU (behind the last conv with the shortcut) in one
  read. Backward: the two sums, then the gradient of the raw output, each in one read. The activations between the
  convolutions are not saved but formed again.

docs/arithmetic.md derives both and counts what they move and save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.reference._common import acc_dtype

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, finalize, flatten, needed, state_grads
from ._checks import check_identity, check_rows, check_shortcut, output_size, prepare_input
from ._library import ForwardOps, cast, define, nchw, nhwc, parameter_grads, refuse_double_backward, weight_grad


class Conv(NamedTuple):
    """A convolution of a block. weight: `[K, C]`, or `[K, C/groups, 3, 3]` with padding = dilation."""

    weight: Tensor
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def geometry(self) -> tuple[int, int, int]:
        """stride, dilation and groups, as `conv3x3` takes them."""
        return self.stride, self.dilation, self.groups

    def output_shape(self, x: tuple[int, ...]) -> tuple[int, ...]:
        """NHWC shape of the output for an NHWC input of shape x."""
        n, h, w, _ = x
        kernel, padding = (1, 0) if self.weight.dim() == 2 else (3, self.dilation)
        ho, wo = (output_size(size, kernel, self.stride, padding, self.dilation) for size in (h, w))
        return n, ho, wo, self.weight.shape[0]

    def fprop(self, k: SimpleNamespace, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return k.conv1x1(x, self.weight, self.stride, False)[0]
        return k.conv3x3(x, self.weight, *self.geometry, False)[0]

    def dgrad(self, k: SimpleNamespace, dy: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """dx, of the shape of x, plus `residual`, whose memory it may take."""
        if self.weight.dim() == 2:
            return k.conv1x1_dgrad(dy, self.weight, x.shape[1:3], self.stride, residual=residual)
        return k.conv3x3_dgrad(dy, self.weight, x.shape[1:3], *self.geometry, residual=residual)[0]

    def wgrad(self, k: SimpleNamespace, x: Tensor, dy: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return k.conv1x1_wgrad(x, dy, self.stride)
        return k.conv3x3_wgrad(x, dy, *self.geometry)


class Moments(NamedTuple):
    """Mean `[K]` and centred scatter `[K, K]` of the rows that a Gram-folded conv reads; None where it is not folded
    or its statistics are constant.
    """

    mean: Tensor | None = None
    scatter: Tensor | None = None


class Layer(NamedTuple):
    """A convolution and its batch norm in backward.

    y: the raw conv output, None where it was Gram-folded, and then `moments`. bn: the batch norm's `[4, C]`.
    need_weight, need_bn: whether the conv's weight, and whether gamma or beta need gradients.
    """

    conv: Conv
    y: Tensor | None
    bn: Tensor
    moments: Moments
    batch_stats: bool
    need_weight: bool
    need_bn: bool

    @property
    def need(self) -> bool:
        return self.need_weight or self.need_bn


class Saved(NamedTuple):
    """Of a forward pass, for each conv (a projection's last): the raw output and `bn`; and the last conv's and the
    projection's moments.
    """

    out: Tensor
    raw: Sequence[Tensor | None]
    vectors: Sequence[Tensor]
    moments: Moments = Moments()
    moments_p: Moments = Moments()


class Gradients(NamedTuple):
    """Of x, of the shortcut, and of each layer (a projection last) the weight's, in acc, and `grad` `[4, C]`.

    None where not needed.
    """

    dx: Tensor | None
    dshortcut: Tensor | None
    weights: Sequence[Tensor | None]
    grads: Sequence[Tensor | None]


# The stored form


def stored_forward(
    k: SimpleNamespace,
    x: Tensor,
    convs: Sequence[Conv],
    bns: Sequence[BatchNormParams],
    projection: Conv | None,
    shortcut: Tensor | None,
) -> Saved:
    raw: list[Tensor] = []
    vectors: list[Tensor] = []
    for conv, params in zip(convs, bns, strict=False):
        raw.append(conv.fprop(k, k.bn_act(raw[-1], vectors[-1]) if raw else x))
        vectors.append(_statistics(k, raw[-1], params))
    if projection is None:
        return Saved(k.bn_act(raw[-1], vectors[-1], x if shortcut is None else shortcut), raw, vectors)
    y_p = projection.fprop(k, x)
    bn_p = _statistics(k, y_p, bns[-1])
    return Saved(k.bn_act(raw[-1], vectors[-1], y_p, bn_p), [*raw, y_p], [*vectors, bn_p])


def _statistics(k: SimpleNamespace, y: Tensor, params: BatchNormParams) -> Tensor:
    return finalize(k, params, k.channel_stats(y) if params.batch_stats else None, y.dtype)


def stored_backward(
    k: SimpleNamespace,
    g: Tensor,
    x: Tensor,
    out: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None,
    identity: bool,
    need_x: bool,
    need_shortcut: bool,
) -> Gradients:
    # For each layer, whether the gradient of its raw output is needed, for its weight or by something in front of it.
    need_dy = [need_x or layers[0].need_weight]
    for front, layer in zip(layers, layers[1:], strict=False):
        need_dy.append(need_dy[-1] or front.need_bn or layer.need_weight)
    need_p = projection is not None and (need_x or projection.need_weight)
    weights: list[Tensor | None] = [None] * len(layers)
    grads: list[Tensor | None] = [None] * len(layers)
    dx = dy = residual = None

    grads[-1], grad_p = _sums_of_both_branches(k, g, out, layers[-1], projection, need_dy[-1], need_p)
    need_residual = need_shortcut or need_p or (identity and need_x)
    if need_dy[-1] or need_residual:
        dy, residual = _apply_to_both_branches(k, g, out, layers[-1], projection, grads[-1], grad_p, need_residual)
    for i in range(len(layers) - 1, 0, -1):
        layer, front = layers[i], layers[i - 1]
        if layer.need_weight:
            weights[i] = layer.conv.wgrad(k, k.bn_act(front.y, front.bn), dy)
        if not (need_dy[i - 1] or front.need_bn):
            break
        g = layer.conv.dgrad(k, dy, front.y)
        if _needs_sums(front, need_dy[i - 1]):
            grads[i - 1] = _vectors(k, front, k.bn_bwd_reduce(g, front.y, front.bn, relu=True)[0])
        if not need_dy[i - 1]:
            break
        dy, _ = k.bn_bwd_apply(g, front.y, front.bn, grads[i - 1], relu=True)
    if layers[0].need_weight:
        weights[0] = layers[0].conv.wgrad(k, x, dy)
    if need_x:
        dx = layers[0].conv.dgrad(k, dy, x, residual if identity else None)
    if projection is not None:
        weights.append(projection.conv.wgrad(k, x, residual) if projection.need_weight else None)
        grads.append(grad_p)
        if need_x:
            dx = projection.conv.dgrad(k, residual, x, dx)
    return Gradients(dx, residual if need_shortcut else None, weights, grads)


def _needs_sums(layer: Layer, need_dy: bool) -> bool:
    """With constant statistics the gradient passes without sums."""
    return layer.need_bn or (layer.batch_stats and need_dy)


def _vectors(k: SimpleNamespace, layer: Layer, sums: Tensor) -> Tensor:
    return k.bn_bwd_finalize(sums, layer.bn, layer.y.shape[:3].numel() if layer.batch_stats else None)


def _sums_of_both_branches(
    k: SimpleNamespace, g: Tensor, out: Tensor, last: Layer, projection: Layer | None, need_dy: bool, need_p: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`grad` of the last batch norm and of the projection's, from one read of g and out."""
    for_last = _needs_sums(last, need_dy)
    for_p = projection is not None and _needs_sums(projection, need_p)
    if not (for_last or for_p):
        return None, None
    branch = {"residual": projection.y, "residual_bn": projection.bn} if for_p else {}
    sums, sums_p = k.bn_bwd_reduce(g, last.y, last.bn, out=out, **branch)
    return _vectors(k, last, sums), _vectors(k, projection, sums_p) if for_p else None


def _apply_to_both_branches(
    k: SimpleNamespace,
    g: Tensor,
    out: Tensor,
    last: Layer,
    projection: Layer | None,
    grad: Tensor | None,
    grad_p: Tensor | None,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the last conv's raw output and of the shortcut: of x, of a ready-made one, or a projection's raw."""
    branch = {}
    if projection is not None:
        raw = projection.y if projection.batch_stats else None
        branch = {"residual": raw, "residual_bn": projection.bn, "residual_grad": grad_p}
    raw = last.y if last.batch_stats else None
    return k.bn_bwd_apply(g, raw, last.bn, grad, out=out, need_residual=need_residual, **branch)


# Operators


class ResidualBlock:
    """A kind of block as operators; making one registers it in `KINDS`.

    name: of its function. depth: convolutions of the main branch. folds_last: whether the Gram-folded form folds the
    last of them too, not only a projection. convs: `convs(weights, *geometry)` gives the convolutions, a projection
    last. forward, backward: the Gram-folded form, called as `stored_forward` and `stored_backward` are.
    """

    def __init__(
        self,
        name: str,
        depth: int,
        folds_last: bool,
        convs: Callable[..., list[Conv]],
        forward: Callable[..., Saved],
        backward: Callable[..., Gradients],
    ):
        self.name, self.depth, self.folds_last, self.convs = name, depth, folds_last, convs
        self._folded_forward, self._folded_backward = forward, backward

        def results(*stems: str) -> str:
            return ", ".join(f"Tensor {stem}{i}" for stem in stems for i in (*range(1, depth + 1), "_p"))

        self.forward_ops = ForwardOps(
            name,
            "Tensor x, Tensor[] weights, Tensor? shortcut",
            f"Tensor out, {results('y', 'bn')}, Tensor mean, Tensor scatter, Tensor mean_p, Tensor scatter_p",
            self._forward,
            self._forward_fake,
        )
        self.backward_op = define(
            f"{name}_bwd",
            "(Tensor g, Tensor x, Tensor[] weights, Tensor out, Tensor?[] saved, bool[] batch_stats, bool identity, "
            f"bool[] needs, int[] geometry, str backend) -> (Tensor dx, Tensor dshortcut, {results('dw', 'grad')})",
            self._backward,
            self._backward_fake,
        )
        KINDS[name] = self

    def _padded(self, values: Sequence) -> list:
        """One value for each conv of the main branch and one for a projection, None where there is none."""
        return [*values, *[None] * (self.depth + 1 - len(values))]

    def _plan(self, x: Tensor, convs: Sequence[Conv], backend: str) -> SimpleNamespace:
        """By channel counts, which do not change from batch to batch, as what is saved must not."""
        # As integers: a traced graph is one for these channels, whatever it leaves open.
        channels = [tuple(map(int, conv.weight.shape[1::-1])) for conv in convs]
        first, (last, projection) = channels[0][1], self._padded(channels)[self.depth - 1 :]
        return plan.resolve_block(x.dtype, x.device, backend, first, last if self.folds_last else None, projection)

    def _forward(self, x, weights, shortcut, bns, geometry, backend) -> tuple[Tensor | None, ...]:
        convs = self.convs(weights, *geometry)
        k = self._plan(x, convs, backend)
        *convs, projection = self._padded(convs)
        form = self._folded_forward if k.gram_folding else stored_forward
        saved = form(k, x, convs, bns, projection, shortcut)
        raw, vectors = self._padded(saved.raw), self._padded(saved.vectors)
        return saved.out, *raw, *vectors, *saved.moments, *saved.moments_p

    def _backward(
        self, g, x, weights, out, saved, batch_stats, identity, needs, geometry, backend
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, the shortcut and the weights (in acc), and `grad` `[4, C]` of each batch norm.

        None where not needed. needs: x, shortcut, then the weights, then for each batch norm whether gamma or beta need
        theirs. saved: what `_forward` returned behind out.
        """
        convs = self.convs(weights, *geometry)
        k = self._plan(x, convs, backend)
        count = len(weights)
        need_x, need_shortcut, *need = needs
        need_weights, need_bns = need[:count], need[count:]
        raw, vectors, moments = saved[: self.depth + 1], saved[self.depth + 1 : -4], saved[-4:]
        of_last, of_projection = Moments(*moments[:2]), Moments(*moments[2:])
        all_moments = [*[Moments()] * (self.depth - 1), of_last, of_projection]
        each = zip(convs, raw, vectors, all_moments, strict=False)
        layers = [
            Layer(*layer, *flags) for layer, *flags in zip(each, batch_stats, need_weights, need_bns, strict=True)
        ]
        *layers, projection = self._padded(layers)
        # By what was saved: the plan may be another one by now.
        last = layers[-1] if self.folds_last else projection
        folded = k.gram_folding if last is None else last.y is None
        form = self._folded_backward if folded else stored_backward
        found = form(k, g, x, out, layers, projection, identity, need_x, need_shortcut)
        dw = [
            weight_grad(grad, weight) if wanted else None
            for grad, weight, wanted in zip(found.weights, weights, need_weights, strict=True)
        ]
        grads = [grad if wanted else None for grad, wanted in zip(found.grads, need_bns, strict=True)]
        return found.dx, found.dshortcut, *self._padded(dw), *self._padded(grads)

    def _forward_fake(self, x, weights, shortcut, bns, geometry, backend):
        convs = self.convs(weights, *geometry)
        shapes = output_shapes(x.shape, convs[: self.depth])
        wide = x.new_empty(0, dtype=acc_dtype(x.dtype))
        raw = [x.new_empty(shape) for shape in shapes]
        out = torch.empty_like(raw[-1])
        if len(convs) > self.depth:
            raw.append(torch.empty_like(out))
        moments = [None] * 4
        k = self._plan(x, convs, backend)
        if k.gram_folding:
            reads = [shapes[-2][3], x.shape[3]]
            # A basic block's own list is there to fold its projection.
            fold_projection = k.fold_projection or not self.folds_last
            folds = [False] * (self.depth - 1) + [self.folds_last, fold_projection]
            for i in (i for i in range(len(convs)) if folds[i]):
                raw[i] = None
                if bns[i].batch_stats:
                    branch = i - self.depth + 1
                    c = reads[branch]
                    moments[2 * branch : 2 * branch + 2] = wide.new_empty(c), wide.new_empty(c, c)
        vectors = [wide.new_empty(4, weight.shape[0]) for weight in weights]
        return out, *self._padded(raw), *self._padded(vectors), *moments

    def _backward_fake(self, g, x, weights, out, saved, batch_stats, identity, needs, geometry, backend):
        count = len(weights)
        need_x, need_shortcut, *need = needs
        acc = acc_dtype(x.dtype)
        dw = [
            torch.empty_like(weight, dtype=acc) if wanted else None
            for weight, wanted in zip(weights, need[:count], strict=True)
        ]
        vectors = zip(saved[self.depth + 1 :], need[count:], strict=False)
        grads = [torch.empty_like(bn) if wanted else None for bn, wanted in vectors]
        dshortcut = torch.empty_like(out) if need_shortcut else None
        return torch.empty_like(x) if need_x else None, dshortcut, *self._padded(dw), *self._padded(grads)


KINDS: dict[str, ResidualBlock] = {}
"""Each kind by its name."""


def output_shapes(shape: tuple[int, ...], convs: Sequence[Conv]) -> list[tuple[int, ...]]:
    """NHWC shapes of the outputs of convolutions that follow each other, for an NHWC input."""
    shapes = []
    for conv in convs:
        shape = conv.output_shape(shape)
        shapes.append(shape)
    return shapes


class Config(NamedTuple):
    """kind: a key of `KINDS`. geometry: what its `convs` takes besides the weights."""

    kind: str
    geometry: tuple[int, ...]
    bn: BatchNormConfig
    backend: str


class ResidualFunction(torch.autograd.Function):
    """A residual block for autograd. Tensors after `shortcut`: conv weights, then `TENSORS` for each batch norm."""

    @staticmethod
    def forward(ctx, config: Config, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Tensor:
        kind, count = KINDS[config.kind], len(config.bn.eps)
        parameters, state = tensors[:count], tensors[count:]
        weights = cast(parameters, x.dtype)
        inputs = nhwc(x), weights, None if shortcut is None else nhwc(shortcut)
        out, *saved = kind.forward_ops(inputs, config.bn, state, config.geometry, config.backend)
        ctx.config = config
        ctx.identity = shortcut is None and count == kind.depth
        ctx.state_dtypes = [None if tensor is None else tensor.dtype for tensor in state]
        ctx.save_for_backward(x, out, *parameters, *weights, *saved)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        config = ctx.config
        kind, count = KINDS[config.kind], len(config.bn.eps)
        x, out, *saved = ctx.saved_tensors
        parameters, weights, saved = saved[:count], saved[count : 2 * count], saved[2 * count :]
        _, need_x, need_shortcut, *need = ctx.needs_input_grad
        need_state = need[count:]
        needs = [need_x, need_shortcut, *need[:count], *needed(need_state)]
        with torch.no_grad():
            dx, dshortcut, *rest = kind.backward_op(
                nhwc(g), nhwc(x), weights, nhwc(out), saved, list(config.bn.batch_stats), ctx.identity, needs,
                list(config.geometry), config.backend,
            )  # fmt: skip
            dw, vectors = rest[:count], rest[kind.depth + 1 : kind.depth + 1 + count]
            grads = [None if grad is None else nchw(grad) for grad in (dx, dshortcut)]
            grads += [*parameter_grads(dw, parameters), *state_grads(vectors, ctx.state_dtypes, need_state)]
        return None, *refuse_double_backward(grads, g, x, *parameters)


def residual_block(
    kind: str,
    x: Tensor,
    weights: Sequence[Tensor],
    bns: Sequence[BatchNormParams],
    projection: tuple[Tensor, BatchNormParams] | None,
    shortcut: Tensor | None,
    geometry: Sequence[int],
    backend: str,
) -> Tensor:
    """A block of `KINDS`: checks what `fastres.functional.<kind>` was given and runs it."""
    if projection is not None and shortcut is not None:
        raise ValueError(f"{kind}: pass either projection or shortcut, not both")
    x = prepare_input(kind, x, weights[0])
    shapes = output_shapes(x.permute(0, 2, 3, 1).shape, KINDS[kind].convs(weights, *geometry))
    shapes = [(n, c, h, w) for n, h, w, c in shapes]
    output = shapes[-1]
    if projection is not None:
        weights, bns, shapes = [*weights, projection[0]], [*bns, projection[1]], [*shapes, output]
    for params, shape in zip(bns, shapes, strict=True):
        check_rows(params, shape)
    if shortcut is not None:
        shortcut = check_shortcut(kind, shortcut, output, x.dtype)
    elif projection is None:
        check_identity(kind, x, output)
    config, state = flatten(bns)
    return ResidualFunction.apply(Config(kind, tuple(geometry), config, backend), x, shortcut, *weights, *state)
