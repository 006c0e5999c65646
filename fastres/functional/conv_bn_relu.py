"""A convolution of any kernel size with its batch norm and, optionally, ReLU.

Saved for backward are x and the raw conv output y: the ReLU's mask is recomputed from y.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.reference._common import acc_dtype

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, finalize, flatten, needed, state_grads
from ._checks import check_rows, output_size, prepare_input
from ._library import ForwardOps, cast, define, nchw, nhwc, parameter_grads, refuse_double_backward, weight_grad

Pair = tuple[int, int]


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

    @property
    def conv(self) -> tuple[Pair, Pair, Pair, int]:
        """stride, padding, dilation and groups, as `conv2d` takes them."""
        return self[0:2], self[2:4], self[4:6], self.groups


class Config(NamedTuple):
    geometry: Geometry
    bn: BatchNormConfig
    backend: str


def _forward(
    x: Tensor, weight: Tensor, bns: list[BatchNormParams], geometry: list[int], backend: str
) -> tuple[Tensor, ...]:
    k = plan.resolve(x.dtype, x.device, backend)
    shape = Geometry(*geometry)
    y = k.conv2d(x, weight, *shape.conv)
    bn = finalize(k, bns[0], k.channel_stats(y) if bns[0].batch_stats else None, x.dtype)
    return k.bn_act(y, bn, relu=bool(shape.relu)), y, bn


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
    """dx, dW (in acc) and `grad` `[4, K]`; needs: x, weight, gamma or beta."""
    k = plan.resolve(x.dtype, x.device, backend)
    shape = Geometry(*geometry)
    need_x, need_w, need_bn = needs
    relu = bool(shape.relu)
    dx = dw = grad = None
    if need_bn or batch_stats:
        sums, _ = k.bn_bwd_reduce(g, y, bn, relu=relu)
        grad = k.bn_bwd_finalize(sums, bn, y.shape[:3].numel() if batch_stats else None)
    if need_x or need_w:
        dy, _ = k.bn_bwd_apply(g, y if batch_stats or relu else None, bn, grad, relu=relu)
    if need_w:
        dw = weight_grad(k.conv2d_wgrad(x, dy, weight.shape[2:], *shape.conv), weight)
    if need_x:
        dx = k.conv2d_dgrad(dy, weight, x.shape[1:3], *shape.conv)
    return dx, dw, grad if need_bn else None


def _output_shape(x: Tensor, weight: Tensor, shape: Geometry) -> tuple[int, ...]:
    """NHWC shape of the output for an NHWC x."""
    stride, padding, dilation, _ = shape.conv
    n, *hw, _ = x.shape
    ho, wo = (output_size(hw[i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return n, ho, wo, weight.shape[0]


def _forward_fake(x, weight, bns, geometry, backend):
    y = x.new_empty(_output_shape(x, weight, Geometry(*geometry)))
    return y, torch.empty_like(y), x.new_empty(4, weight.shape[0], dtype=acc_dtype(x.dtype))


def _backward_fake(g, x, weight, y, bn, batch_stats, needs, geometry, backend):
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight, dtype=bn.dtype) if needs[1] else None,
        torch.empty_like(bn) if needs[2] else None,
    )


_forward_ops = ForwardOps(
    "conv_bn_relu", "Tensor x, Tensor weight", "Tensor out, Tensor y, Tensor bn", _forward, _forward_fake
)
_backward_op = define(
    "conv_bn_relu_bwd",
    "(Tensor g, Tensor x, Tensor weight, Tensor y, Tensor bn, bool batch_stats, bool[] needs, int[] geometry, "
    "str backend) -> (Tensor dx, Tensor dw, Tensor grad)",
    _backward,
    _backward_fake,
)


class ConvBNReLUFunction(torch.autograd.Function):
    """`conv_bn_relu` for autograd."""

    @staticmethod
    def forward(ctx, config: Config, x: Tensor, parameter: Tensor, *state: Tensor | None) -> Tensor:
        (weight,) = cast([parameter], x.dtype)
        out, y, bn = _forward_ops((nhwc(x), weight), config.bn, state, config.geometry, config.backend)
        ctx.config = config
        ctx.state_dtypes = [None if tensor is None else tensor.dtype for tensor in state]
        ctx.save_for_backward(x, parameter, weight, y, bn)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        config = ctx.config
        x, parameter, weight, y, bn = ctx.saved_tensors
        _, need_x, need_w, *need_state = ctx.needs_input_grad
        with torch.no_grad():
            dx, dw, grad = _backward_op(
                nhwc(g), nhwc(x), weight, y, bn, config.bn.batch_stats[0], [need_x, need_w, *needed(need_state)],
                list(config.geometry), config.backend,
            )  # fmt: skip
            grads = [None if dx is None else nchw(dx), *parameter_grads([dw], [parameter])]
            grads += state_grads([grad], ctx.state_dtypes, need_state)
        return None, *refuse_double_backward(grads, g, x, parameter)


def conv_bn_relu(
    x: Tensor,
    conv_weight: Tensor,
    bn: BatchNormParams,
    *,
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
        backend: one of `fastres.backends.CHOICES`.

    Returns:
        `[N, K, Ho, Wo]` in channels_last memory, in x's dtype or autocast's.

    Raises:
        As `fastres.functional.bottleneck`.
    """
    x = prepare_input("conv_bn_relu", x, conv_weight, groups)
    geometry = Geometry(*stride, *padding, *dilation, groups, int(relu))
    n, h, w, c = _output_shape(x.permute(0, 2, 3, 1), conv_weight, geometry)
    if h < 1 or w < 1:
        raise ValueError(f"conv_bn_relu: x of {tuple(x.shape[2:])} pixels is smaller than the dilated kernel")
    check_rows(bn, (n, c, h, w))
    config, state = flatten([bn])
    return ConvBNReLUFunction.apply(Config(geometry, config, backend), x, conv_weight, *state)
