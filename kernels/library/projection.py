"""The projection shortcut by the library's 1x1 convolution, with passes around it."""

from __future__ import annotations

from torch import Tensor

from ..reference._common import acc_dtype, rows, strided_pixels
from ..reference.batch_norm import ChannelStats
from ..reference.gram import Gram
from ._common import affine, masked
from .conv1x1 import conv1x1, conv1x1_wgrad
from .expand import input_grad
from .gram import gram_of_rows


def projection_gram(x: Tensor, stride: int) -> Gram:
    """As the reference."""
    return gram_of_rows(rows(strided_pixels(x, stride)))


def projection_fprop(
    x: Tensor, weight: Tensor, bn: Tensor, stride: int, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """As the reference; the product is rounded to x's dtype before scale and shift, and these before the residual."""
    out = affine(conv1x1(x, weight, stride, with_stats=False)[0], bn[2], bn[3])
    if residual is not None:
        out.add_(residual)
    return out.relu_() if relu else out


def projection_conv(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, ChannelStats]:
    """As the reference."""
    return conv1x1(x, weight, stride)


def projection_wgrad(
    g: Tensor, x: Tensor, stride: int, out: Tensor | None = None, with_sum: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As the reference."""
    if out is not None:
        g = masked(g, out)
    return conv1x1_wgrad(x, g, stride), rows(g).sum(0, dtype=acc_dtype(g.dtype)) if with_sum else None


def projection_dgrad(
    dx: Tensor,
    g: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor | None,
    k: Tensor | None,
    stride: int,
    out: Tensor | None = None,
    relu: bool = False,
    v_scale: Tensor | None = None,
    d: Tensor | None = None,
) -> None:
    """As the reference."""
    if out is not None:
        g = masked(g, out)
    x = strided_pixels(x, stride)
    pixels = strided_pixels(dx, stride)
    pixels.add_(input_grad(rows(g), rows(x), u, v, k, v_scale, d).view(pixels.shape))
    if relu:
        pixels.masked_fill_(x <= 0, 0)
