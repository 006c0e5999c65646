"""1x1 convolutions as matrix products by the library's GEMM."""

from __future__ import annotations

from torch import Tensor

from ..reference._common import rows, strided_pixels
from ..reference.batch_norm import ChannelStats
from ..reference.conv2d import Pair
from ._common import bn_input_grad, matmul_acc
from .batch_norm import channel_stats


def conv1x1(
    x: Tensor, weight: Tensor, stride: int = 1, with_stats: bool = True
) -> tuple[Tensor, ChannelStats | None]:
    """As the reference."""
    x = strided_pixels(x, stride)
    y = (rows(x) @ weight.T).view(*x.shape[:3], -1)
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
    """As the reference; dy is written and read once."""
    dy = rows(bn_input_grad(g, y, bn, grad))
    shape = (g.shape[0], *input_hw, weight.shape[1])
    if stride == 1:
        dx = dy @ weight if residual is None else rows(residual).addmm(dy, weight)
        return dx.view(shape)
    dx = g.new_zeros(shape) if residual is None else residual.clone()
    pixels = strided_pixels(dx, stride)
    pixels.add_((dy @ weight).view(pixels.shape))
    return dx


def conv1x1_wgrad(
    x: Tensor, g: Tensor, bn: Tensor, grad: Tensor, *, y: Tensor | None = None, stride: int = 1
) -> Tensor:
    """As the reference; dy is written and read once."""
    return matmul_acc(rows(bn_input_grad(g, y, bn, grad)).T, rows(strided_pixels(x, stride)))
