"""1x1 convolutions as GEMMs over pixels; backward can form the gradient behind the batch norm as it loads."""

from __future__ import annotations

from torch import Tensor

from ._common import acc, activation, bn_input_grad, masked, rows, strided_pixels
from .batch_norm import ChannelStats, channel_stats
from .conv2d import Pair

ONE_PASS_CHANNELS = 128
"""Output channels up to which `conv1x1_bwd` is one pass on a GPU: a tile has to hold all of dy's."""


def conv1x1(
    x: Tensor, weight: Tensor, stride: int = 1, with_stats: bool = True, bn: Tensor | None = None
) -> tuple[Tensor, ChannelStats | None]:
    """y `[N, Ho, Wo, K]` = x_s W^T and its statistics (None without `with_stats`).

    x `[N, H, W, C]`, x_s = x[:, ::stride, ::stride], weight `[K, C]`; y is rounded once to x's dtype. With `bn`
    `[4, C]`, x is raw and the conv's input is relu(scale*x + shift), rounded to x's dtype.
    """
    y = (acc(activation(strided_pixels(x, stride), bn)) @ acc(weight).T).to(x.dtype)
    return y, channel_stats(y) if with_stats else None


def _raw_grad(g: Tensor, y: Tensor | None, bn: Tensor | None, grad: Tensor | None) -> Tensor:
    return g if bn is None else bn_input_grad(g, y, bn, grad).to(g.dtype)


def conv1x1_dgrad(
    g: Tensor,
    weight: Tensor,
    input_hw: Pair,
    stride: int = 1,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    keep_residual: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """dx `[N, H, W, C]` = dy W (+ residual), masked by a ReLU where `mask` is given.

    g `[N, Ho, Wo, K]` is dy; or, with `bn` and `grad`, the gradient of that BN's output, from which dy =
    scale*(g + b*y + c) is formed on load, `y` `[N, Ho, Wo, K]` being the BN's raw input, None for constant statistics.
    residual `[N, H, W, C]`: dx may take its memory, unless `keep_residual`. Pixels that the stride skips get the
    residual alone. mask `[N, H, W, C]`: the conv's input, a ReLU's output; for a block in front that expects its
    gradient masked by it.
    """
    dx_s = acc(_raw_grad(g, y, bn, grad)) @ acc(weight)
    dx = dx_s.new_zeros(g.shape[0], *input_hw, weight.shape[1]) if residual is None else acc(residual).clone()
    strided_pixels(dx, stride).add_(dx_s)
    return (dx if mask is None else masked(dx, mask)).to(g.dtype)


def conv1x1_wgrad(
    x: Tensor,
    g: Tensor,
    stride: int = 1,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """dW `[K, C]` in acc = dy^T x_s, with g and dy as in `conv1x1_dgrad`."""
    dy = _raw_grad(g, y, bn, grad)
    return rows(acc(dy)).T @ rows(acc(strided_pixels(x, stride)))


def conv1x1_bwd(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    *,
    bn: Tensor | None = None,
    grad: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    keep_residual: bool = False,
    mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """`conv1x1_dgrad` and `conv1x1_wgrad` of a conv of stride 1: `(dx, dW)`; with `mask`, dx is masked by x."""
    through = {"bn": bn, "grad": grad, "y": y}
    dx = conv1x1_dgrad(g, weight, x.shape[1:3], **through, residual=residual, mask=x if mask else None)
    return dx, conv1x1_wgrad(x, g, **through)
