"""The expanding 1x1 conv that ends a bottleneck, with its BN, shortcut and ReLU as one GEMM with an epilogue.

Possible because `gram_finalize` knows scale and shift before the conv runs: the raw output of the widest conv is never
written, read or saved.
"""

from __future__ import annotations

from torch import Tensor

from ._common import acc, activation, centred_sums, masked, rows, scaled, strided_pixels


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
    """out = relu(out_scale*(a W^T) + out_shift + shortcut), a = relu(scale*y + shift).

    y `[N, H, W, K]`, bn `[4, K]`, weight `[C, K]`, out_bn `[4, C]`, out `[N, H, W, C]`. a is rounded to y's dtype,
    products accumulate in acc, out is rounded once. The shortcut has one of three forms:

    - `shortcut` `[N, H, W, C]` itself;
    - with `shortcut_bn` `[4, C]`: the raw output `[N, H, W, C]` of a projection, shortcut_scale*shortcut +
      shortcut_shift;
    - with `shortcut_weight` Wp `[C, S]` too: the block's input x `[N, H', W', S]`, of which the projection reads x_s =
      x[:, ::stride, ::stride]: shortcut_scale*(x_s Wp^T) + shortcut_shift.
    """
    z = (acc(activation(y, bn)) @ acc(weight).T).mul_(out_bn[2]).add_(out_bn[3])
    if shortcut_weight is not None:
        shortcut = acc(strided_pixels(shortcut, stride)) @ acc(shortcut_weight).T
    if shortcut_bn is not None:
        shortcut = acc(shortcut) * shortcut_bn[2] + shortcut_bn[3]
    return z.add_(shortcut).relu_().to(y.dtype)


def expand_wgrad(
    g: Tensor, out: Tensor | None, y: Tensor, bn: Tensor, *, x: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """P = g'^T a and sum g', with g' = g masked by the ReLU of `out` and a = relu(scale*y + shift).

    g, out `[N, H, W, C]`, y `[N, H, W, K]`. Without `out`, g is masked already. With x `[N, H', W', S]`, the input of a
    projection shortcut of this stride, also Px = g'^T x_s.

    Returns `(p, sum_g, g', p_x)`: `[C, K]` and `[C]` in acc, `[N, H, W, C]` (g itself without `out`), and `[C, S]` in
    acc or None.
    """
    if out is not None:
        g = masked(g, out)
    wide = rows(acc(g))
    p_x = None if x is None else wide.T @ rows(acc(strided_pixels(x, stride)))
    return wide.T @ rows(acc(activation(y, bn))), wide.sum(0), g, p_x


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
    """The gradient in front of `bn`: (g u + v_scale*(a v) + d*a + k) masked by the ReLU of a = relu(scale*y + shift),
    and its sums.

    g `[N, H, W, C]` (masked already); u `[C, K]`, v `[K, K]`, k and d `[K]` and v_scale `[]` from `gram_bwd`; without v
    there is none of the last three; y `[N, H, W, K]`. Returns the masked gradient `[N, H, W, K]` and the sums
    `[P, 2, K]` of `bn_bwd_reduce`.
    """
    da = acc(g) @ acc(u)
    if v is not None:
        a = acc(activation(y, bn))
        da += scaled(a @ acc(v), v_scale) + k
        if d is not None:
            da += d * a
    g = masked(da, acc(y) * bn[2] + bn[3]).to(g.dtype)
    return g, centred_sums(g, y, bn)
