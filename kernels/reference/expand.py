"""The expanding 1x1 conv that ends a bottleneck, with its BN, shortcut and ReLU as one GEMM with an epilogue.

Possible because `gram_finalize` knows scale and shift before the conv runs: the raw output of the widest conv is never
written, read or saved.
"""

from __future__ import annotations

from torch import Tensor

from ._common import acc, activation, centred_sums, masked, rows


def expand(y: Tensor, bn: Tensor, weight: Tensor, out_bn: Tensor, shortcut: Tensor) -> Tensor:
    """out = relu(out_scale*(a W^T) + out_shift + shortcut), a = relu(scale*y + shift).

    y `[N, H, W, K]`, bn `[4, K]`, weight `[C, K]`, out_bn `[4, C]`, shortcut and out `[N, H, W, C]`. a is rounded to
    y's dtype, the GEMM accumulates in acc, out is rounded once.
    """
    z = (acc(activation(y, bn)) @ acc(weight).T).mul_(out_bn[2]).add_(out_bn[3]).add_(shortcut)
    return z.relu_().to(y.dtype)


def expand_wgrad(g: Tensor, out: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P = g'^T a and sum g', with g' = g masked by the ReLU of `out` and a = relu(scale*y + shift).

    g, out `[N, H, W, C]`, y `[N, H, W, K]`. Returns `(p, sum_g, g')`: `[C, K]` and `[C]` in acc, `[N, H, W, C]`.
    """
    g = masked(g, out)
    wide = rows(acc(g))
    return wide.T @ rows(acc(activation(y, bn))), wide.sum(0), g


def expand_dgrad(
    g: Tensor, u: Tensor, v: Tensor | None, k: Tensor | None, y: Tensor, bn: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient in front of `bn`: (g u + a v + k) masked by the ReLU of a = relu(scale*y + shift), and its sums.

    g `[N, H, W, C]` (masked already); u `[C, K]`, v `[K, K]`, k `[K]` from `gram_bwd`; y `[N, H, W, K]`.
    Returns the masked gradient `[N, H, W, K]` and the sums `[P, 2, K]` of `bn_bwd_reduce`.
    """
    da = acc(g) @ acc(u)
    if v is not None:
        da += acc(activation(y, bn)) @ acc(v) + k
    g = masked(da, acc(y) * bn[2] + bn[3]).to(g.dtype)
    return g, centred_sums(g, y, bn)
