"""Gram matrices by the library's GEMM; the small-matrix work is the reference's."""

from __future__ import annotations

from torch import Tensor

from ..reference._common import acc_dtype, rows
from ..reference.gram import Gram
from ..reference.gram import gram_of_rows as pivoted_gram_of_rows
from ._common import activation, matmul_acc


def gram_of_rows(a: Tensor) -> Gram:
    """As the reference; bfloat16 and float16 rows are read as they are, about no pivot.

    Their own rounding, 2^-9 of the mean, outweighs what a float32 sum loses until mean/std reaches the hundreds.
    """
    wide = acc_dtype(a.dtype)
    if a.dtype == wide:
        return pivoted_gram_of_rows(a)
    total = a.sum(0, dtype=wide)
    return Gram(matmul_acc(a.T, a), total, total.new_zeros(total.shape))


def gram(y: Tensor, bn: Tensor) -> Gram:
    """As the reference; relu(scale*y + shift) is written and read once."""
    return gram_of_rows(rows(activation(y, bn)))
