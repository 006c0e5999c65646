"""The bottleneck's last 1x1 conv by the library's GEMM, with prologue and epilogue as passes around it."""

from __future__ import annotations

from torch import Tensor

from ..reference._common import acc_dtype, rows, scaled
from ._common import activation, affine, bn_sums, masked, matmul_acc
from .conv1x1 import conv1x1, conv1x1_wgrad


def expand(
    y: Tensor,
    bn: Tensor,
    weight: Tensor,
    out_bn: Tensor,
    shortcut: Tensor,
    *,
    shortcut_bn: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    """As the reference; products are rounded to y's dtype before scale and shift, and these before they are added."""
    z = (rows(activation(y, bn)) @ weight.T).view(*y.shape[:3], -1)
    z = affine(z, out_bn[2], out_bn[3])
    if shortcut_weight is not None:
        shortcut, _ = conv1x1(shortcut, shortcut_weight, stride, with_stats=False)
    if shortcut_bn is not None:
        shortcut = affine(shortcut, shortcut_bn[2], shortcut_bn[3])
    return z.add_(shortcut).relu_()


def expand_wgrad(
    g: Tensor, out: Tensor | None, y: Tensor, bn: Tensor, *, x: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As the reference."""
    if out is not None:
        g = masked(g, out)
    p_x = None if x is None else conv1x1_wgrad(x, g, stride)
    return matmul_acc(rows(g).T, rows(activation(y, bn))), rows(g).sum(0, dtype=acc_dtype(g.dtype)), g, p_x


def input_grad(
    g: Tensor,
    a: Tensor,
    u: Tensor,
    v: Tensor | None,
    k: Tensor | None,
    v_scale: Tensor | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """g u + v_scale*(a v) + d*a + k of rows g `[M, C]` and a `[M, K]`, in acc; all but u may be None.

    Not rounded before it is added up: the terms may cancel, as where g goes along with the output.
    """
    da = matmul_acc(g, u)
    if v is not None and v.dtype == da.dtype and v_scale is None:
        da.addmm_(a, v)
    elif v is not None:
        da += scaled(matmul_acc(a, v), v_scale)
    if d is not None:
        da.addcmul_(a, d)
    if k is not None:
        da += k
    return da


def expand_dgrad(
    g: Tensor,
    u: Tensor,
    v: Tensor | None,
    k: Tensor | None,
    y: Tensor,
    bn: Tensor,
    v_scale: Tensor | None = None,
    d: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    a = activation(y, bn)
    da = input_grad(rows(g), rows(a), u, v, k, v_scale, d).to(g.dtype).view(y.shape)
    g = masked(da, a)
    return g, bn_sums(g, y, bn)
