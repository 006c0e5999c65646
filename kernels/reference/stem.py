"""The stem's BN + ReLU + 3x3/2 max-pool (padding 1), forward and backward.

Forward stores one byte per pooled value (where the maximum lies) and the raw y there, so that the sums of the backward
need pooled-size tensors only: `bn_bwd_reduce(g, y_argmax, bn, out=out)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import acc, bn_input_grad
from .conv2d import Pair

NO_GRADIENT = 9
"""The code of a window whose maximum the ReLU cut off."""


def stem_pool(y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out = maxpool(relu(scale*y + shift)) of y `[N, H, W, C]`.

    Returns `(out, y_argmax, argmax)`, each `[N, Ho, Wo, C]` with Ho = (H + 1)//2: y_argmax is y at the first maximum in
    row-major order (NaN counts as the largest), argmax (uint8) is 3*row + column of it within the window, or 9 where
    the maximum is <= 0 and no gradient passes.
    """
    n, h, w, c = y.shape
    ho, wo = (h + 1) // 2, (w + 1) // 2
    z = acc(y) * bn[2] + bn[3]
    z_padded = F.pad(z, (0, 0, 1, 1, 1, 1), value=float("-inf"))
    y_padded = F.pad(y, (0, 0, 1, 1, 1, 1))
    best = z.new_full((n, ho, wo, c), float("-inf"))
    y_argmax = y.new_zeros(best.shape)
    argmax = torch.zeros(best.shape, dtype=torch.uint8, device=y.device)
    for tap in range(9):
        window = slice(None), slice(tap // 3, tap // 3 + 2 * ho - 1, 2), slice(tap % 3, tap % 3 + 2 * wo - 1, 2)
        value = z_padded[window]
        better = (value > best) | (value.isnan() & ~best.isnan())
        best = torch.where(better, value, best)
        y_argmax = torch.where(better, y_padded[window], y_argmax)
        argmax.masked_fill_(better, tap)
    argmax.masked_fill_(best <= 0, NO_GRADIENT)
    return best.relu_().to(y.dtype), y_argmax, argmax


def stem_pool_bwd(
    g: Tensor, argmax: Tensor, input_hw: Pair, bn: Tensor, grad: Tensor | None, *, y: Tensor | None = None
) -> Tensor:
    """dy `[N, H, W, C]` = scale*(g' + b*y + c), where g' sums the gradients of the windows that chose the pixel.

    g, argmax `[N, Ho, Wo, C]`; (H, W) = input_hw; `y` `[N, H, W, C]` and `grad` may be None for constant statistics.
    """
    (n, ho, wo, c), (h, w) = argmax.shape, input_hw
    routed = acc(g).new_zeros(n, 2 * ho + 1, 2 * wo + 1, c)
    for tap in range(9):
        window = slice(None), slice(tap // 3, tap // 3 + 2 * ho - 1, 2), slice(tap % 3, tap % 3 + 2 * wo - 1, 2)
        routed[window] += torch.where(argmax == tap, acc(g), 0)
    return bn_input_grad(routed[:, 1 : h + 1, 1 : w + 1], y, bn, grad).to(g.dtype)
