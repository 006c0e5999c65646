"""The stem's BN + ReLU + max-pool by ATen's pooling, whose int64 indices become one byte each.

The backward is the reference's: ATen scatters with atomics on a GPU, in another order at every run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference.stem import NO_GRADIENT
from ._common import activation, nchw, nhwc


def stem_pool(y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    n, h, w, c = y.shape
    out, index = F.max_pool2d(nchw(activation(y, bn)), 3, 2, 1, return_indices=True)
    out, index = nhwc(out), nhwc(index)
    y_argmax = y.view(n, h * w, c).gather(1, index.view(n, -1, c)).view(out.shape)
    # First row and first column of each pooled pixel's window; -1 lies in the padding.
    top, left = (2 * torch.arange(size, device=y.device) - 1 for size in out.shape[1:3])
    argmax = 3 * (index // w - top[:, None, None]) + index % w - left[:, None]
    return out, y_argmax, argmax.to(torch.uint8).masked_fill_(out <= 0, NO_GRADIENT)
