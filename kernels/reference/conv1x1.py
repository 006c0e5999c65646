"""1x1 convolutions as GEMMs over pixels; backward forms the gradient behind the batch norm as it loads."""

from __future__ import annotations

from torch import Tensor

from ._common import acc, bn_input_grad, rows, strided_pixels
from .batch_norm import ChannelStats, channel_stats
from .conv2d import Pair


def conv1x1(
    x: Tensor, weight: Tensor, stride: int = 1, with_stats: bool = True
) -> tuple[Tensor, ChannelStats | None]:
    """y `[N, Ho, Wo, K]` = x_s W^T and its statistics (None without `with_stats`).

    x `[N, H, W, C]`, x_s = x[:, ::stride, ::stride], weight `[K, C]`; y is rounded once to x's dtype.
    """
    y = (acc(strided_pixels(x, stride)) @ acc(weight).T).to(x.dtype)
    return y, channel_stats(y) if with_stats else None


def conv1x1_dgrad(
    g: Tensor,
    weight: Tensor,
    bn: Tensor,
    grad: Tensor,
    input_hw: Pair,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    """dx `[N, H, W, C]` = dy W (+ residual), with dy = scale*(g + b*y + c) formed on load.

    g, y `[N, Ho, Wo, K]`: gradient of the BN's output and the BN's raw input, `y` None for constant statistics.
    residual `[N, H, W, C]`. Pixels that the stride skips get the residual alone.
    """
    dx_s = bn_input_grad(g, y, bn, grad).to(g.dtype)
    dx_s = acc(dx_s) @ acc(weight)
    dx = dx_s.new_zeros(g.shape[0], *input_hw, weight.shape[1]) if residual is None else acc(residual).clone()
    strided_pixels(dx, stride).add_(dx_s)
    return dx.to(g.dtype)


def conv1x1_wgrad(
    x: Tensor, g: Tensor, bn: Tensor, grad: Tensor, *, y: Tensor | None = None, stride: int = 1
) -> Tensor:
    """dW `[K, C]` in acc = dy^T x_s, with dy formed on load as in `conv1x1_dgrad`."""
    dy = bn_input_grad(g, y, bn, grad).to(g.dtype)
    return rows(acc(dy)).T @ rows(acc(strided_pixels(x, stride)))
