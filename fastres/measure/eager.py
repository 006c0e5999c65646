"""PyTorch's operators on NHWC tensors, as a channels_last model calls them: baselines for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def conv(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """x `[N, H, W, C]`, weight `[K, C]` or `[K, C, R, S]`; the result is channels_last `[N, K, Ho, Wo]`."""
    return F.conv2d(_nchw(x), _weight(weight), None, stride, padding)


def conv_backward(
    g: Tensor, x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, *, dgrad: bool = True, wgrad: bool = True
) -> tuple[Tensor | None, ...]:
    """What autograd calls for `conv`: gradients of x and of the weight, from g `[N, Ho, Wo, K]`."""
    # Not torch.nn.grad.conv2d_input, whose placeholder for x makes cuDNN leave channels_last.
    return torch.ops.aten.convolution_backward(
        _nchw(g),
        _nchw(x),
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


class BatchNorm:
    """What a stock model calls for the inputs of one of the batch norm family's cases.

    gamma, beta and the statistics, which a network has at hand, are formed of each `bn` `[4, C]` once, when it is used
    first.
    """

    def __init__(self):
        self._known: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, t: dict[str, object]) -> None:
        if "running_mean" in t:
            state = t["weight"], t["bias"], t["running_mean"], t["running_var"]
            torch.native_batch_norm(_nchw(t["y"]), *state, True, 0.1, 1e-5)
        elif "y" not in t:
            torch.ops.aten.threshold_backward(t["g"] + t["residual"], t["out"], 0)
        elif "g" in t:
            # Where the mask is formed from y, stock reads the activation that it has saved: a tensor of y's size.
            g = torch.ops.aten.threshold_backward(t["g"], t.get("out", t["y"]), 0)
            self._backward(g, t["y"], t["bn"])
            if "residual_bn" in t:
                self._backward(g, t["residual"], t["residual_bn"])
        else:
            z = self._apply(t["y"], t["bn"])
            if "residual_bn" in t:
                z += self._apply(t["residual"], t["residual_bn"])
            elif "residual" in t:
                z += _nchw(t["residual"])
            z.relu_()

    def _apply(self, y: Tensor, bn: Tensor) -> Tensor:
        gamma, beta, mean, var, _ = self._vectors(bn)
        return torch.batch_norm(_nchw(y), gamma, beta, mean, var, False, 0.0, 0.0, False)

    def _backward(self, g: Tensor, y: Tensor, bn: Tensor) -> None:
        gamma, _, mean, var, rstd = self._vectors(bn)
        outputs = [True, True, True]
        backward = torch.ops.aten.native_batch_norm_backward
        backward(_nchw(g), _nchw(y), gamma, mean, var, mean, rstd, True, 0.0, outputs)

    def _vectors(self, bn: Tensor) -> tuple[Tensor, ...]:
        if id(bn) not in self._known:
            mean, rstd, scale, shift = bn
            gamma = scale / rstd
            self._known[id(bn)] = gamma, shift + mean * scale, mean, rstd**-2, rstd
        return self._known[id(bn)]


def _nchw(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)
