"""PyTorch's convolutions on NHWC tensors, as a channels_last model calls them: baselines for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def conv(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """x `[N, H, W, C]`, weight `[K, C]` or `[K, C, R, S]`; the result is channels_last `[N, K, Ho, Wo]`."""
    return F.conv2d(x.permute(0, 3, 1, 2), _weight(weight), None, stride, padding)


def conv_backward(
    g: Tensor, x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, *, dgrad: bool = True, wgrad: bool = True
) -> tuple[Tensor | None, ...]:
    """What autograd calls for `conv`: gradients of x and of the weight, from g `[N, Ho, Wo, K]`."""
    # Not torch.nn.grad.conv2d_input, whose placeholder for x makes cuDNN leave channels_last.
    return torch.ops.aten.convolution_backward(
        g.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        _weight(weight),
        None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [dgrad, wgrad, False],
    )


def _weight(weight: Tensor) -> Tensor:
    weight = weight[:, :, None, None] if weight.dim() == 2 else weight
    return weight.contiguous(memory_format=torch.channels_last)
