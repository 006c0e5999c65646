"""Shared by the reference kernels: accumulation dtype, masks, row views."""

from __future__ import annotations

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over activations of `dtype` are formed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc(t: Tensor) -> Tensor:
    """`t` in its accumulation dtype."""
    return t.to(acc_dtype(t.dtype))


def rows(t: Tensor) -> Tensor:
    """`[N, H, W, C]` as `[M, C]`; a view where the memory allows it."""
    return t.reshape(-1, t.shape[-1])


def strided_pixels(x: Tensor, stride: int) -> Tensor:
    """The pixels that a 1x1 conv of this stride reads: `x[:, ::stride, ::stride]`, a view."""
    return x[:, ::stride, ::stride]


def masked(g: Tensor, z: Tensor) -> Tensor:
    """`g` where the ReLU let its input through; `z` is that ReLU's input or output."""
    return g.masked_fill(z <= 0, 0)


def small_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two small matrices in acc, to acc's full precision.

    On a GPU float32 products are TF32's where the user has allowed that for the sake of a network in float32; batch
    statistics and what backward forms from them bear no 11-bit factors, in any dtype. So they are float64's there.
    """
    if a.dtype == torch.float32 and a.is_cuda:
        return (a.double() @ b.double()).float()
    return a @ b


def scaled_to_float16(v: Tensor) -> tuple[Tensor, Tensor]:
    """v in float16, times a power of two that puts its largest value near 2**15, and the float32 `[]` that undoes that.

    Nothing underflows that is not 2**-24 of the largest value. Values that are not finite stay so.
    """
    # |v| < 2**exponent; the bounds keep the factor finite, and what is below 2**-110 adds nothing to a float16.
    exponent = torch.frexp(torch.linalg.vector_norm(v, torch.inf)).exponent.clamp(-110, 128)
    scale = torch.exp2((15 - exponent).float())
    return (v * scale).half(), scale.reciprocal()


def scaled(t: Tensor, scale: Tensor | None) -> Tensor:
    """t times the scalar `[]`; None is 1."""
    return t if scale is None else t * scale


def activation(y: Tensor, bn: Tensor | None) -> Tensor:
    """relu(scale*y + shift) rounded to y's dtype, as a GEMM reads it; y itself when there is no `bn`."""
    if bn is None:
        return y
    return (acc(y) * bn[2] + bn[3]).relu_().to(y.dtype)


def bn_input_grad(g: Tensor, y: Tensor | None, bn: Tensor, grad: Tensor | None) -> Tensor:
    """dy = scale*(g + b*y + c) in acc; without `y` or `grad` (constant statistics, b = c = 0) scale*g."""
    if y is None or grad is None:
        return acc(g) * bn[2]
    return bn[2] * (acc(g) + grad[2] * acc(y) + grad[3])


def centred_sums(g: Tensor, y: Tensor, bn: Tensor) -> Tensor:
    """sum g and sum g*(y - mean) over rows, `[1, 2, C]`: one partial of a batch norm's backward reduction."""
    g, y = rows(acc(g)), rows(acc(y))
    return torch.stack([g.sum(0), (g * (y - bn[0])).sum(0)]).unsqueeze(0)
