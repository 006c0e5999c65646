"""The projection shortcut: a strided 1x1 conv with its BN as a GEMM over gathered pixels.

Source: He et al. (2015), section 3.3, shortcut option B. x_s = x[:, ::stride, ::stride] is what the conv reads, M its
pixels. Gram-folded, statistics follow from `projection_gram`, and `projection_fprop` ends with the BN; stored,
`projection_conv` writes the raw output.
"""

from __future__ import annotations

from torch import Tensor

from ._common import acc, masked, rows, scaled, strided_pixels
from .batch_norm import ChannelStats, channel_stats
from .gram import Gram, gram_of_rows


def projection_gram(x: Tensor, stride: int) -> Gram:
    """The second moments of x_s; x `[N, H, W, C]`."""
    return gram_of_rows(rows(strided_pixels(x, stride)))


def projection_fprop(
    x: Tensor, weight: Tensor, bn: Tensor, stride: int, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """scale*(x_s W^T) + shift (+ residual) (through a ReLU), `[N, Ho, Wo, K]`, rounded once to x's dtype.

    weight W `[K, C]`, bn `[4, K]`, residual `[N, Ho, Wo, K]`.
    """
    out = acc(strided_pixels(x, stride)) @ acc(weight).T * bn[2] + bn[3]
    if residual is not None:
        out += residual
    return (out.relu_() if relu else out).to(x.dtype)


def projection_conv(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, ChannelStats]:
    """y `[N, Ho, Wo, K]` = x_s W^T, rounded once to x's dtype, and the statistics of the rounded y."""
    y = (acc(strided_pixels(x, stride)) @ acc(weight).T).to(x.dtype)
    return y, channel_stats(y)


def projection_wgrad(
    g: Tensor, x: Tensor, stride: int, out: Tensor | None = None, with_sum: bool = True
) -> tuple[Tensor, Tensor | None]:
    """P = g'^T x_s, `[K, C]`, and sum g', `[K]` (None without `with_sum`), in acc.

    g `[N, Ho, Wo, K]`; g' is g masked by the ReLU of out `[N, Ho, Wo, K]`, or g where there is no out.
    """
    g = rows(acc(g if out is None else masked(g, out)))
    return g.T @ rows(acc(strided_pixels(x, stride))), g.sum(0) if with_sum else None


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
    """Add g' u + v_scale*(x_s v) + d*x_s + k to the strided pixels of dx `[N, H, W, C]`, in place, rounded once to dx's
    dtype.

    g, g' and out as in `projection_wgrad`; u `[K, C]`, v `[C, C]`, k and d `[C]` and v_scale `[]` from `gram_bwd` (None
    for constant statistics, v_scale but for float16, d but for 16 bits). relu: mask these pixels of dx by the ReLU that
    gave x, for a block before this one that expects its gradient so.
    """
    added = acc(g if out is None else masked(g, out)) @ acc(u)
    x_s = acc(strided_pixels(x, stride))
    if v is not None:
        added += scaled(x_s @ acc(v), v_scale)
    if d is not None:
        added += d * x_s
    if k is not None:
        added += k
    pixels = strided_pixels(dx, stride)
    added += acc(pixels)
    pixels.copy_(masked(added, strided_pixels(x, stride)) if relu else added)
