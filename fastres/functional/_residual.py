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
from ._batch_norm import TENSORS, BatchNormConfig, BatchNormParams, finalize, flatten, needed, state_grads
from ._checks import check_identity, check_rows, check_shortcut, prepare_input
from ._conv import Conv
from ._library import ForwardOps, cast, define, nchw, nhwc, parameter_grads, refuse_double_backward, weight_grad


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


def project(k: SimpleNamespace, x: Tensor, projection: Conv, params: BatchNormParams) -> tuple[Tensor, Tensor]:
    """The raw output of a projection that is not Gram-folded, and its `bn`."""
    if params.batch_stats:
        y, stats = k.projection_conv(x, projection.weight, projection.stride)
    else:
        y, stats = k.conv1x1(x, projection.weight, projection.stride, with_stats=False)
    return y, finalize(k, params, stats, x.dtype)


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
        raw.append(_raw(k, conv, k.bn_act(raw[-1], vectors[-1]) if raw else x))
        vectors.append(_statistics(k, raw[-1], params))
    if projection is None:
        return Saved(k.bn_act(raw[-1], vectors[-1], x if shortcut is None else shortcut), raw, vectors)
    y_p = _raw(k, projection, x)
    bn_p = _statistics(k, y_p, bns[-1])
    return Saved(k.bn_act(raw[-1], vectors[-1], y_p, bn_p), [*raw, y_p], [*vectors, bn_p])


def _raw(k: SimpleNamespace, conv: Conv, x: Tensor) -> Tensor:
    return conv.fprop(k, x, with_stats=False)[0]


def _statistics(k: SimpleNamespace, y: Tensor, params: BatchNormParams) -> Tensor:
    return finalize(k, params, k.channel_stats(y) if params.batch_stats else None, y.dtype)


def stored_backward(
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
    """Without `out`, g is masked already. mask_input: dx is masked by x, for the block in front."""
    # For each layer, whether the gradient of its raw output is needed, for its weight or by something in front of it.
    need_dy = [need_x or layers[0].need_weight]
    for front, layer in zip(layers, layers[1:], strict=False):
        need_dy.append(need_dy[-1] or front.need_bn or layer.need_weight)
    need_p = projection is not None and (need_x or projection.need_weight)
    weights: list[Tensor | None] = [None] * len(layers)
    grads: list[Tensor | None] = [None] * len(layers)
    dx = dy = residual = None

    grads[-1], grad_p = sums_of_both_branches(k, g, out, layers[-1], projection, need_dy[-1], need_p)
    need_residual = need_shortcut or need_p or (identity and need_x)
    if need_dy[-1] or need_residual:
        dy, residual = apply_to_both_branches(k, g, out, layers[-1], projection, grads[-1], grad_p, need_residual)
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
        # Without out, the residual is the g that the operator was given.
        dx = layers[0].conv.dgrad(k, dy, x, residual if identity else None, out is None, mask_input)
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


def sums_of_both_branches(
    k: SimpleNamespace,
    g: Tensor,
    out: Tensor | None,
    last: Layer,
    projection: Layer | None,
    need_dy: bool,
    need_p: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`grad` of the last batch norm and of the projection's, from one read of g and out."""
    for_last = _needs_sums(last, need_dy)
    for_p = projection is not None and _needs_sums(projection, need_p)
    if not (for_last or for_p):
        return None, None
    branch = {"residual": projection.y, "residual_bn": projection.bn} if for_p else {}
    sums, sums_p = k.bn_bwd_reduce(g, last.y, last.bn, out=out, **branch)
    return _vectors(k, last, sums), _vectors(k, projection, sums_p) if for_p else None


def apply_to_both_branches(
    k: SimpleNamespace,
    g: Tensor,
    out: Tensor | None,
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
        # Results of the forward operator behind the output: raw outputs, vectors, and both pairs of moments.
        self.saved = 2 * (depth + 1) + 4

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
            "(Tensor g, Tensor x, Tensor[] weights, Tensor? out, Tensor?[] saved, bool[] batch_stats, bool identity, "
            "bool mask_input, bool[] needs, int[] geometry, str backend) -> "
            f"(Tensor dx, Tensor dshortcut, {results('dw', 'grad')})",
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
        self, g, x, weights, out, saved, batch_stats, identity, mask_input, needs, geometry, backend
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, the shortcut and the weights (in acc), and `grad` `[4, C]` of each batch norm.

        None where not needed. needs: x, shortcut, then the weights, then for each batch norm whether gamma or beta need
        theirs. saved: what `_forward` returned behind out. out: None where g is masked by it already; such a block has
        no ready-made shortcut, whose gradient would be g itself. mask_input: mask dx by x, a ReLU's output, for the
        block in front; of a block with an identity shortcut.
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
        # By what was saved: the plan may be another one by now. Of a basic block either form takes raw outputs.
        last = layers[-1] if self.folds_last else projection
        folded = (last is not None and last.y is None) or (k.gram_folding and not self.folds_last)
        form = self._folded_backward if folded else stored_backward
        found = form(k, g, x, out, layers, projection, identity, mask_input, need_x, need_shortcut)
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
            folds = [False] * (self.depth - 1) + [self.folds_last, k.fold_projection]
            for i in (i for i in range(len(convs)) if folds[i]):
                raw[i] = None
                if bns[i].batch_stats:
                    branch = i - self.depth + 1
                    c = reads[branch]
                    moments[2 * branch : 2 * branch + 2] = wide.new_empty(c), wide.new_empty(c, c)
        vectors = [wide.new_empty(4, weight.shape[0]) for weight in weights]
        return out, *self._padded(raw), *self._padded(vectors), *moments

    def _backward_fake(self, g, x, weights, out, saved, batch_stats, identity, mask_input, needs, geometry, backend):
        count = len(weights)
        need_x, need_shortcut, *need = needs
        acc = acc_dtype(x.dtype)
        dw = [
            torch.empty_like(weight, dtype=acc) if wanted else None
            for weight, wanted in zip(weights, need[:count], strict=True)
        ]
        vectors = zip(saved[self.depth + 1 :], need[count:], strict=False)
        grads = [torch.empty_like(bn) if wanted else None for bn, wanted in vectors]
        dshortcut = torch.empty_like(g) if need_shortcut else None
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


class Block(NamedTuple):
    """What a block computes with, besides x and a ready-made shortcut.

    kind: a key of `KINDS`. weights, bns: of the main branch. projection: of the shortcut, `(weight, bn)`. geometry:
    what the kind's `convs` takes besides the weights.
    """

    kind: str
    weights: Sequence[Tensor]
    bns: Sequence[BatchNormParams]
    projection: tuple[Tensor, BatchNormParams] | None
    geometry: tuple[int, ...]


class Config(NamedTuple):
    """The Python constants of a block. identity: whether its shortcut is its input itself."""

    kind: str
    geometry: tuple[int, ...]
    bn: BatchNormConfig
    identity: bool
    backend: str


class ResidualFunction(torch.autograd.Function):
    """A chain of residual blocks for autograd; a block by itself is a chain of one, which may have a shortcut.

    Tensors after `shortcut`: of each block its conv weights, then `TENSORS` for each batch norm.

    A block with an identity shortcut forms the gradient of its input in one place, and masks it there by the ReLU of
    the block in front of it. That block then neither reads its output for the mask nor writes a masked gradient.
    """

    @staticmethod
    def forward(
        ctx, configs: tuple[Config, ...], x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        saved, ctx.state_dtypes = [x], []
        for config, operands in zip(configs, _of_each_block(configs, tensors), strict=True):
            count = len(config.bn.eps)
            parameters, state = operands[:count], operands[count:]
            weights = cast(parameters, x.dtype)
            inputs = nhwc(x), weights, None if shortcut is None else nhwc(shortcut)
            x, *found = KINDS[config.kind].forward_ops(inputs, config.bn, state, config.geometry, config.backend)
            saved += [x, *parameters, *weights, *found]
            ctx.state_dtypes.append([None if tensor is None else tensor.dtype for tensor in state])
        ctx.configs = configs
        ctx.save_for_backward(*saved)
        return x

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        configs, (x, *saved) = ctx.configs, ctx.saved_tensors
        _, need_input, need_shortcut, *need = ctx.needs_input_grad
        needs = _of_each_block(configs, need)
        blocks = _slices(saved, [1 + 2 * len(config.bn.eps) + KINDS[config.kind].saved for config in configs])
        inputs = [x, *(block[0] for block in blocks[:-1])]
        parameters: list[Tensor] = []
        grads: list[Tensor | None] = []
        dx, dshortcut, masked = nhwc(g), None, False
        with torch.no_grad():
            for i in range(len(configs) - 1, -1, -1):
                config = configs[i]
                kind, count = KINDS[config.kind], len(config.bn.eps)
                need_weights, need_state = needs[i][:count], needs[i][count:]
                out, *own = blocks[i]
                parameters = [*own[:count], *parameters]
                # Behind the first block a gradient is needed in front: see `chain`.
                need_x, mask_input = (True, config.identity) if i > 0 else (need_input, False)
                dx, dshortcut, *rest = kind.backward_op(
                    dx, nhwc(inputs[i]), own[count : 2 * count], None if masked else nhwc(out), own[2 * count :],
                    list(config.bn.batch_stats), config.identity, mask_input,
                    [need_x, need_shortcut, *need_weights, *needed(need_state)], list(config.geometry), config.backend,
                )  # fmt: skip
                dw, vectors = rest[:count], rest[kind.depth + 1 : kind.depth + 1 + count]
                state = state_grads(vectors, ctx.state_dtypes[i], need_state)
                grads = [*parameter_grads(dw, own[:count]), *state, *grads]
                masked = mask_input
        grads = [*(None if grad is None else nchw(grad) for grad in (dx, dshortcut)), *grads]
        return None, *refuse_double_backward(grads, g, x, *parameters)


def _of_each_block(configs: Sequence[Config], values: Sequence) -> list[Sequence]:
    """What `ResidualFunction` takes for each block, of all blocks' tensors or something for each of them."""
    return _slices(values, [(1 + TENSORS) * len(config.bn.eps) for config in configs])


def _slices(values: Sequence, sizes: Sequence[int]) -> list[Sequence]:
    """Consecutive slices of these sizes."""
    slices, start = [], 0
    for size in sizes:
        slices.append(values[start : start + size])
        start += size
    return slices


def configure(
    unit: str, block: Block, shape: tuple[int, ...], backend: str, has_shortcut: bool = False
) -> tuple[Config, list[Tensor | None], tuple[int, ...]]:
    """What `ResidualFunction` takes for a block whose input has this shape `[N, C, H, W]`, and the output's shape.

    Raises ValueError where the block cannot run on such an input, under the name `unit`.
    """
    n, c, h, w = shape
    shapes = output_shapes((n, h, w, c), KINDS[block.kind].convs(block.weights, *block.geometry))
    shapes = [(n, c, h, w) for n, h, w, c in shapes]
    output = shapes[-1]
    weights, bns = block.weights, block.bns
    if block.projection is not None:
        weights, bns, shapes = [*weights, block.projection[0]], [*bns, block.projection[1]], [*shapes, output]
    for params, of_conv in zip(bns, shapes, strict=True):
        check_rows(params, of_conv)
    identity = block.projection is None and not has_shortcut
    if identity:
        check_identity(unit, shape, output)
    constants, state = flatten(bns)
    return Config(block.kind, tuple(block.geometry), constants, identity, backend), [*weights, *state], output


def chain(configs: Sequence[Config], x: Tensor, tensors: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The blocks of these `configure` results on a prepared x, under as few functions as possible."""
    first = 0
    # In front of the first block that needs a gradient nothing is saved, and a chain would only keep tensors alive.
    while first < len(configs) and not _needs_grad(x, tensors[first]):
        x = ResidualFunction.apply((configs[first],), x, None, *tensors[first])
        first += 1
    if first == len(configs):
        return x
    return ResidualFunction.apply(tuple(configs[first:]), x, None, *(t for block in tensors[first:] for t in block))


def _needs_grad(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))


def residual_block(block: Block, x: Tensor, shortcut: Tensor | None, backend: str) -> Tensor:
    """A block by itself: checks what `fastres.functional.<kind>` was given and runs it."""
    kind = block.kind
    if shortcut is not None and block.projection is not None:
        raise ValueError(f"{kind}: pass either projection or shortcut, not both")
    x = prepare_input(kind, x, block.weights[0])
    config, tensors, output = configure(kind, block, x.shape, backend, shortcut is not None)
    if shortcut is not None:
        shortcut = check_shortcut(kind, shortcut, output, x.dtype)
    return ResidualFunction.apply((config,), x, shortcut, *tensors)
