"""The stem of an ImageNet ResNet: a strided convolution, batch norm, ReLU and a 3x3/2 max-pool.

Source: He et al. (2015), table 1 (conv1 and the pooling that opens conv2_x). Saved for backward are x, the raw conv
output y, and of pooled size the output, y at the maximum and one byte that says where the maximum was.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.reference._common import acc_dtype
from fastres.kernels.reference.conv2d import Pair

from .. import plan
from ._batch_norm import BatchNormConfig, BatchNormParams, finalize, flatten, needed, state_grads
from ._checks import check_rows, output_size, prepare_input
from ._library import ForwardOps, cast, define, nchw, nhwc, parameter_grads, refuse_double_backward, weight_grad


class Geometry(NamedTuple):
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int

    @property
    def conv(self) -> tuple[Pair, Pair]:
        """stride and padding, as `conv2d` takes them."""
        return self[0:2], self[2:4]


class Config(NamedTuple):
    geometry: Geometry
    bn: BatchNormConfig
    backend: str


def _forward(
    x: Tensor, weight: Tensor, bns: list[BatchNormParams], geometry: list[int], backend: str
) -> tuple[Tensor, ...]:
    k = plan.resolve(x.dtype, x.device, backend)
    y = k.conv2d(x, weight, *Geometry(*geometry).conv)
    bn = finalize(k, bns[0], k.channel_stats(y) if bns[0].batch_stats else None, x.dtype)
    out, y_argmax, argmax = k.stem_pool(y, bn)
    return out, y, y_argmax, argmax, bn


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    y: Tensor,
    y_argmax: Tensor,
    argmax: Tensor,
    bn: Tensor,
    batch_stats: bool,
    needs: list[bool],
    geometry: list[int],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """dx, dW (in acc) and `grad` `[4, K]`; needs: x, weight, gamma or beta."""
    k = plan.resolve(x.dtype, x.device, backend)
    conv = Geometry(*geometry).conv
    need_x, need_w, need_bn = needs
    dx = dw = grad = None
    if need_bn or batch_stats:
        # The pooled tensors suffice: a pixel that no window chose has no gradient and adds nothing to either sum.
        sums, _ = k.bn_bwd_reduce(g, y_argmax, bn, out=out)
        grad = k.bn_bwd_finalize(sums, bn, y.shape[:3].numel() if batch_stats else None)
    if need_x or need_w:
        dy = k.stem_pool_bwd(g, argmax, y.shape[1:3], bn, grad, y=y if batch_stats else None)
    if need_w:
        dw = weight_grad(k.conv2d_wgrad(x, dy, weight.shape[2:], *conv), weight)
    if need_x:
        dx = k.conv2d_dgrad(dy, weight, x.shape[1:3], *conv)
    return dx, dw, grad if need_bn else None


def _output_shapes(x: Tensor, weight: Tensor, shape: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """NHWC shapes of the conv's and of the pooled output for an NHWC x."""
    stride, padding = shape.conv
    n, *hw, _ = x.shape
    h, w = (output_size(hw[i], weight.shape[2 + i], stride[i], padding[i], 1) for i in (0, 1))
    return (n, h, w, weight.shape[0]), (n, (h + 1) // 2, (w + 1) // 2, weight.shape[0])


def _forward_fake(x, weight, bns, geometry, backend):
    y, pooled = _output_shapes(x, weight, Geometry(*geometry))
    return (
        x.new_empty(pooled),
        x.new_empty(y),
        x.new_empty(pooled),
        x.new_empty(pooled, dtype=torch.uint8),
        x.new_empty(4, weight.shape[0], dtype=acc_dtype(x.dtype)),
    )


def _backward_fake(g, x, weight, out, y, y_argmax, argmax, bn, batch_stats, needs, geometry, backend):
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight, dtype=bn.dtype) if needs[1] else None,
        torch.empty_like(bn) if needs[2] else None,
    )


_forward_ops = ForwardOps(
    "stem",
    "Tensor x, Tensor weight",
    "Tensor out, Tensor y, Tensor y_argmax, Tensor argmax, Tensor bn",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "stem_bwd",
    "(Tensor g, Tensor x, Tensor weight, Tensor out, Tensor y, Tensor y_argmax, Tensor argmax, Tensor bn, "
    "bool batch_stats, bool[] needs, int[] geometry, str backend) -> (Tensor dx, Tensor dw, Tensor grad)",
    _backward,
    _backward_fake,
)


class StemFunction(torch.autograd.Function):
    """`stem` for autograd."""

    @staticmethod
    def forward(ctx, config: Config, x: Tensor, parameter: Tensor, *state: Tensor | None) -> Tensor:
        (weight,) = cast([parameter], x.dtype)
        out, *saved = _forward_ops((nhwc(x), weight), config.bn, state, config.geometry, config.backend)
        ctx.config = config
        ctx.state_dtypes = [None if tensor is None else tensor.dtype for tensor in state]
        ctx.save_for_backward(x, parameter, weight, out, *saved)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        config = ctx.config
        x, parameter, weight, out, *saved = ctx.saved_tensors
        _, need_x, need_w, *need_state = ctx.needs_input_grad
        with torch.no_grad():
            dx, dw, grad = _backward_op(
                nhwc(g), nhwc(x), weight, nhwc(out), *saved, config.bn.batch_stats[0],
                [need_x, need_w, *needed(need_state)], list(config.geometry), config.backend,
            )  # fmt: skip
            grads = [None if dx is None else nchw(dx), *parameter_grads([dw], [parameter])]
            grads += state_grads([grad], ctx.state_dtypes, need_state)
        return None, *refuse_double_backward(grads, g, x, parameter)


def stem(
    x: Tensor,
    conv_weight: Tensor,
    bn: BatchNormParams,
    *,
    stride: Pair = (2, 2),
    padding: Pair = (3, 3),
    backend: str = "auto",
) -> Tensor:
    """maxpool(relu(BN(conv(x)))), fused; the pool is 3x3, stride 2, padding 1.

    Args:
        x: `[N, C, H, W]`; channels_last memory is taken as it is, other memory is converted once.
        conv_weight: `[K, C, R, S]`; stride, padding (of zeros): (height, width).
        bn: the batch norm; running statistics are updated in place.
        backend: one of `fastres.backends.CHOICES`.

    Returns:
        `[N, K, (Ho + 1)//2, (Wo + 1)//2]` in channels_last memory, in x's dtype or autocast's.

    Raises:
        As `fastres.functional.bottleneck`.
    """
    x = prepare_input("stem", x, conv_weight)
    geometry = Geometry(*stride, *padding)
    (n, h, w, c), _ = _output_shapes(x.permute(0, 2, 3, 1), conv_weight, geometry)
    if h < 1 or w < 1:
        raise ValueError(f"stem: x of {tuple(x.shape[2:])} pixels is smaller than the kernel")
    check_rows(bn, (n, c, h, w))
    config, state = flatten([bn])
    return StemFunction.apply(Config(geometry, config, backend), x, conv_weight, *state)
