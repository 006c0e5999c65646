"""The projection shortcut by the library's GEMM over gathered pixels."""

from __future__ import annotations

from torch import Tensor

from ..reference._common import rows, strided_pixels
from ..reference.gram import Gram
from ._common import affine, matmul_acc
from .expand import input_grad
from .gram import gram_of_rows


def projection_gram(x: Tensor, stride: int) -> Gram:
    """As the reference."""
    return gram_of_rows(rows(strided_pixels(x, stride)))


def projection_fprop(x: Tensor, weight: Tensor, bn: Tensor, stride: int) -> Tensor:
    """As the reference; the product is rounded to x's dtype before scale and shift."""
    x = strided_pixels(x, stride)
    return affine((rows(x) @ weight.T).view(*x.shape[:3], -1), bn[2], bn[3])


def projection_wgrad(g: Tensor, x: Tensor, stride: int) -> Tensor:
    """As the reference."""
    return matmul_acc(rows(g).T, rows(strided_pixels(x, stride)))


def projection_dgrad(
    dx: Tensor, g: Tensor, x: Tensor, u: Tensor, v: Tensor | None, k: Tensor | None, stride: int
) -> None:
    """As the reference."""
    pixels = strided_pixels(dx, stride)
    pixels.add_(input_grad(rows(g), rows(strided_pixels(x, stride)), u, v, k).view(pixels.shape))
