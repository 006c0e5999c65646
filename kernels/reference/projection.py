"""The projection shortcut: a strided 1x1 conv with its BN, Gram-folded, as one GEMM over gathered pixels.

Source: He et al. (2015), section 3.3, shortcut option B. x_s = x[:, ::stride, ::stride] is what the conv reads.
"""

from __future__ import annotations

from torch import Tensor

from ._common import acc, rows, strided_pixels
from .gram import Gram, gram_of_rows


def projection_gram(x: Tensor, stride: int) -> Gram:
    """The second moments of x_s; x `[N, H, W, C]`."""
    return gram_of_rows(rows(strided_pixels(x, stride)))


def projection_fprop(x: Tensor, weight: Tensor, bn: Tensor, stride: int) -> Tensor:
    """scale*(x_s W^T) + shift, `[N, Ho, Wo, K]`; weight `[K, C]`, bn `[4, K]`. Rounded once to x's dtype."""
    return (acc(strided_pixels(x, stride)) @ acc(weight).T * bn[2] + bn[3]).to(x.dtype)


def projection_wgrad(g: Tensor, x: Tensor, stride: int) -> Tensor:
    """P = g^T x_s, `[K, C]` in acc; g `[N, Ho, Wo, K]`."""
    return rows(acc(g)).T @ rows(acc(strided_pixels(x, stride)))


def projection_dgrad(
    dx: Tensor, g: Tensor, x: Tensor, u: Tensor, v: Tensor | None, k: Tensor | None, stride: int
) -> None:
    """Add g u + x_s v + k to the strided pixels of dx `[N, H, W, C]`, in place.

    g `[N, Ho, Wo, K]`; u `[K, C]`, v `[C, C]`, k `[C]` from `gram_bwd` (v and k None for constant statistics).
    """
    da = acc(g) @ acc(u)
    if v is not None:
        da += acc(strided_pixels(x, stride)) @ acc(v) + k
    pixels = strided_pixels(dx, stride)
    pixels.copy_(acc(pixels) + da)
