"""The stem's BN + ReLU + max-pool by ATen's pooling, whose int64 indices become one byte each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference.conv2d import Pair
from ..reference.stem import NO_GRADIENT
from ._common import activation, bn_input_grad, nchw, nhwc


def _window_origin(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """First row `[Ho]` and first column `[Wo]` of each pooled pixel's window; -1 lies in the padding."""
    return tuple(2 * torch.arange(size, device=device) - 1 for size in shape[1:3])


def stem_pool(y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    n, h, w, c = y.shape
    out, index = F.max_pool2d(nchw(activation(y, bn)), 3, 2, 1, return_indices=True)
    out, index = nhwc(out), nhwc(index)
    y_argmax = y.view(n, h * w, c).gather(1, index.view(n, -1, c)).view(out.shape)
    top, left = _window_origin(out.shape, y.device)
    argmax = 3 * (index // w - top[:, None, None]) + index % w - left[:, None]
    return out, y_argmax, argmax.to(torch.uint8).masked_fill_(out <= 0, NO_GRADIENT)


def stem_pool_bwd(
    g: Tensor, argmax: Tensor, input_hw: Pair, bn: Tensor, grad: Tensor, *, y: Tensor | None = None
) -> Tensor:
    """As the reference."""
    (n, _, _, c), (h, w) = argmax.shape, input_hw
    top, left = _window_origin(argmax.shape, g.device)
    cut = argmax == NO_GRADIENT
    tap = argmax.masked_fill(cut, 4).long()  # the centre of a window always lies within the image
    index = (top[:, None, None] + tap // 3) * w + left[:, None] + tap % 3
    routed = g.new_zeros(n, h * w, c)
    routed.scatter_add_(1, index.view(n, -1, c), g.masked_fill(cut, 0).view(n, -1, c))
    return bn_input_grad(routed.view(n, h, w, c), y, bn, grad)
