"""The bottleneck's last 1x1 conv by the library's GEMM, with prologue and epilogue as passes around it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._common import acc_dtype, rows
from ._common import activation, affine, bn_sums, masked, matmul_acc


def expand(y: Tensor, bn: Tensor, weight: Tensor, out_bn: Tensor, shortcut: Tensor) -> Tensor:
    """As the reference; the product is rounded to y's dtype before the epilogue."""
    z = (rows(activation(y, bn)) @ weight.T).view(shortcut.shape)
    return affine(z, out_bn[2], out_bn[3]).add_(shortcut).relu_()


def expand_wgrad(g: Tensor, out: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    g = masked(g, out)
    return matmul_acc(rows(g).T, rows(activation(y, bn))), rows(g).sum(0, dtype=acc_dtype(g.dtype)), g


def input_grad(g: Tensor, a: Tensor, u: Tensor, v: Tensor | None, k: Tensor | None) -> Tensor:
    """g u + a v + k of rows g `[M, C]` and a `[M, K]`, in g's dtype; v and k may be None."""
    if v is None:
        da = g @ u.to(g.dtype)
        return da if k is None else da.add_(k)
    if k is None:
        k = u.new_zeros(u.shape[1])
    if v.dtype != g.dtype:  # float16: v underflows in it
        return (g @ u.to(g.dtype) + (a.to(v.dtype) @ v + k)).to(g.dtype)
    return torch.addmm(k.to(g.dtype), g, u).addmm_(a, v)


def expand_dgrad(
    g: Tensor, u: Tensor, v: Tensor | None, k: Tensor | None, y: Tensor, bn: Tensor
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    a = activation(y, bn)
    da = input_grad(rows(g), rows(a), u, v, k).view(y.shape)
    g = masked(da, a)
    return g, bn_sums(g, y, bn)
