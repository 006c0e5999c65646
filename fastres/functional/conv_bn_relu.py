"""A convolution of any kernel size with its batch norm and, optionally, ReLU.

Saved for backward are x and the raw conv output y: the ReLU's mask is recomputed from y. The conv's bias is never added
to y but to vectors of the batch norm (docs/arithmetic.md, "Convolution, batch norm, ReLU").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.reference._common import acc, acc_dtype
from fastres.kernels.reference.conv2d import Pair

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, finalize, flatten, needed, state_grads
from ._checks import check_rows, prepare_input
from ._conv import GeneralConv
from ._library import ForwardOps, cast, define, nchw, nhwc, parameter_grads, refuse_double_backward, weight_grad


class Geometry(NamedTuple):
    """`groups` and `relu` as integers: the operators carry all of it as one list."""

    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    relu: int

    def conv(self, weight: Tensor) -> GeneralConv:
        """The convolution with this weight."""
        return GeneralConv(weight, self[0:2], self[2:4], self[4:6], self.groups)


class Config(NamedTuple):
    geometry: Geometry
    bn: BatchNormConfig
    backend: str


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, bns: list[BatchNormParams], geometry: list[int], backend: str
) -> tuple[Tensor, ...]:
    k = plan.resolve(x.dtype, x.device, backend)
    shape = Geometry(*geometry)
    (params,) = bns
    y, stats = shape.conv(weight).by_its_shape().fprop(k, x, params.batch_stats)
    if bias is not None and not params.batch_stats:
        params = params._replace(running_mean=acc(params.running_mean) - acc(bias))
    bn = finalize(k, params, stats, x.dtype)
    if bias is not None and params.batch_stats:
        _add_to_running_mean(params, bias)
    return k.bn_act(y, bn, relu=bool(shape.relu)), y, bn


def _add_to_running_mean(params: BatchNormParams, bias: Tensor) -> None:
    """The conv's bias, with the share that the mean of the batch without it has been given."""
    mean = params.running_mean
    if mean is None:
        return
    if params.momentum is None:
        mean.addcdiv_(bias.to(mean.dtype), params.num_batches_tracked.to(mean.dtype))
    else:
        mean.add_(bias, alpha=params.momentum)


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bn: Tensor,
    batch_stats: bool,
    needs: list[bool],
    geometry: list[int],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """dx, dW and dbias (in acc) and `grad` `[4, K]`; needs: x, weight, the conv's bias, gamma or beta."""
    k = plan.resolve(x.dtype, x.device, backend)
    shape = Geometry(*geometry)
    conv = shape.conv(weight).by_its_shape()
    need_x, need_w, need_bias, need_bn = needs
    need_dy = need_x or need_w
    relu = bool(shape.relu)
    dx = dw = dbias = grad = None
    if need_bn or (need_dy if batch_stats else need_bias):
        sums, _ = k.bn_bwd_reduce(g, y, bn, relu=relu)
        grad = k.bn_bwd_finalize(sums, bn, y.shape[:3].numel() if batch_stats else None)
    if need_dy:
        # A 1x1 conv's kernels could form dy on load, but from g', which only takes the place of g: the caller's memory.
        dy, _ = k.bn_bwd_apply(g, y if batch_stats or relu else None, bn, grad, relu=relu)
    if need_w:
        dw = weight_grad(conv.wgrad(k, x, dy), weight)
    if need_x:
        dx = conv.dgrad(k, dy, x)
    if need_bias:
        # The mean of the batch takes a bias away again.
        dbias = torch.zeros_like(bn[2]) if batch_stats else bn[2] * grad[1]
    return dx, dw, dbias, grad if need_bn else None


def _forward_fake(x, weight, bias, bns, geometry, backend):
    y = x.new_empty(Geometry(*geometry).conv(weight).output_shape(x.shape))
    return y, torch.empty_like(y), x.new_empty(4, weight.shape[0], dtype=acc_dtype(x.dtype))


def _backward_fake(g, x, weight, y, bn, batch_stats, needs, geometry, backend):
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight, dtype=bn.dtype) if needs[1] else None,
        torch.empty_like(bn[2]) if needs[2] else None,
        torch.empty_like(bn) if needs[3] else None,
    )


_forward_ops = ForwardOps(
    "conv_bn_relu",
    "Tensor x, Tensor weight, Tensor? bias",
    "Tensor out, Tensor y, Tensor bn",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "conv_bn_relu_bwd",
    "(Tensor g, Tensor x, Tensor weight, Tensor y, Tensor bn, bool batch_stats, bool[] needs, int[] geometry, "
    "str backend) -> (Tensor dx, Tensor dw, Tensor dbias, Tensor grad)",
    _backward,
    _backward_fake,
)


class ConvBNReLUFunction(torch.autograd.Function):
    """`conv_bn_relu` for autograd."""

    @staticmethod
    def forward(
        ctx, config: Config, x: Tensor, parameter: Tensor, bias: Tensor | None, *state: Tensor | None
    ) -> Tensor:
        (weight,) = cast([parameter], x.dtype)
        out, y, bn = _forward_ops((nhwc(x), weight, bias), config.bn, state, config.geometry, config.backend)
        ctx.config = config
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.state_dtypes = [None if tensor is None else tensor.dtype for tensor in state]
        ctx.save_for_backward(x, parameter, weight, y, bn)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        config = ctx.config
        x, parameter, weight, y, bn = ctx.saved_tensors
        _, *need_conv, need_bias = ctx.needs_input_grad[:4]
        need_state = ctx.needs_input_grad[4:]
        with torch.no_grad():
            dx, dw, dbias, grad = _backward_op(
                nhwc(g), nhwc(x), weight, y, bn, config.bn.batch_stats[0], [*need_conv, need_bias, *needed(need_state)],
                list(config.geometry), config.backend,
            )  # fmt: skip
            grads = [None if dx is None else nchw(dx), *parameter_grads([dw], [parameter])]
            grads += [None if dbias is None else dbias.to(ctx.bias_dtype)]
            grads += state_grads([grad], ctx.state_dtypes, need_state)
        return None, *refuse_double_backward(grads, g, x, parameter)


def conv_bn_relu(
    x: Tensor,
    conv_weight: Tensor,
    bn: BatchNormParams,
    *,
    conv_bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """relu(BN(conv(x))), fused; `relu=False` leaves the ReLU out.

    Args:
        x: `[N, C, H, W]`; channels_last memory is taken as it is, other memory is converted once.
        conv_weight: `[K, C/groups, R, S]`; stride, padding (of zeros), dilation: (height, width).
        bn: the batch norm; running statistics are updated in place.
        conv_bias: `[K]`. With batch statistics it moves the running mean alone, and its gradient is zero.
        backend: one of `fastres.backends.CHOICES`.

    Returns:
        `[N, K, Ho, Wo]` in channels_last memory, in x's dtype or autocast's.

    Raises:
        As `fastres.functional.bottleneck`; ValueError for a `conv_bias` of another shape.
    """
    x = prepare_input("conv_bn_relu", x, conv_weight, groups)
    channels = conv_weight.shape[:1]
    if any(vector is not None and vector.shape != channels for vector in bn[:4]):
        shapes = sorted({tuple(vector.shape) for vector in bn[:4] if vector is not None})
        raise ValueError(f"conv_bn_relu: bn must be of {channels[0]} channels, as the conv gives, is of {shapes}")
    if conv_bias is not None and conv_bias.shape != conv_weight.shape[:1]:
        raise ValueError(
            f"conv_bn_relu: conv_bias must be [{conv_weight.shape[0]}], as the weight says, is {tuple(conv_bias.shape)}"
        )
    geometry = Geometry(*stride, *padding, *dilation, groups, int(relu))
    n, c, h, w = x.shape
    n, h, w, c = geometry.conv(conv_weight).output_shape((n, h, w, c))
    if h < 1 or w < 1:
        raise ValueError(f"conv_bn_relu: x of {tuple(x.shape[2:])} pixels is smaller than the dilated kernel")
    check_rows(bn, (n, c, h, w))
    config, state = flatten([bn])
    return ConvBNReLUFunction.apply(Config(geometry, config, backend), x, conv_weight, conv_bias, *state)
