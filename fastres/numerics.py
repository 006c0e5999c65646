"""The numerics contract: how far our results may be from exact ones, judged by how far stock's are.

    ||ours - exact|| <= k*||stock - exact|| + eps(dtype)/8*||exact||

with k = 2, Frobenius norms, `exact` computed in float64 from the same inputs, and `stock` by PyTorch's own operators in
the same dtype as ours. No tolerance is guessed: the first term is what rounding costs anyone who computes in `dtype`;
the second, an eighth of a rounding unit, serves results where stock happens to be exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

K = 2.0
"""How many times stock's error ours may be."""


@dataclass(frozen=True)
class ThreeWay:
    """error, stock_error: norms of the differences from exact; bound: what error may be; norm: of the exact result."""

    error: float
    stock_error: float
    bound: float
    norm: float

    @property
    def ok(self) -> bool:
        """Whether ours is within the bound; never for NaN."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error as a share of what is allowed; at most 1 where it is ok."""
        return self.error / self.bound if self.bound else 0.0 if self.error == 0 else math.inf

    def __str__(self) -> str:
        return (
            f"error {self.error:.3g}, stock's {self.stock_error:.3g}, allowed {self.bound:.3g}, "
            f"norm of the exact result {self.norm:.3g}"
        )


def three_way(ours: Tensor, stock: Tensor, exact: Tensor, dtype: torch.dtype, k: float = K) -> ThreeWay:
    """Compare `ours` and `stock` with `exact` (float64), all of one shape.

    dtype: the dtype of the computation, that of the activations; sums and statistics of bfloat16 activations are kept
    in float32 and still judged as bfloat16. Raises ValueError where shapes differ or `exact` is not float64.
    """
    if not ours.shape == stock.shape == exact.shape:
        raise ValueError(f"shapes differ: ours {ours.shape}, stock {stock.shape}, exact {exact.shape}")
    if exact.dtype != torch.float64:
        raise ValueError(f"exact must be float64, is {exact.dtype}")
    exact = exact.detach()
    norm = exact.norm().item()
    error, stock_error = ((t.detach().to(exact) - exact).norm().item() for t in (ours, stock))
    return ThreeWay(error, stock_error, k * stock_error + torch.finfo(dtype).eps / 8 * norm, norm)


def assert_three_way(name: str, ours: Tensor, stock: Tensor, exact: Tensor, dtype: torch.dtype, k: float = K) -> None:
    """Raise AssertionError, naming what `name` is, unless `three_way` holds."""
    result = three_way(ours, stock, exact, dtype, k)
    assert result.ok, f"{name} ({dtype}): {result}"


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: what one rounding costs at most, relatively."""
    return torch.finfo(dtype).eps / 2


def assert_sums(ours: Tensor, exact: Tensor, magnitudes: Tensor, additions: int) -> None:
    """Raise AssertionError, with the first wrong element, unless every element of `ours` is a sum within its bound.

    That is `additions` roundings in the accumulation dtype of at most the sum of the magnitudes (Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, equation 3.5, with a margin for the few operations around the sum), then
    one rounding to the dtype of `ours`, of half a subnormal where that is more.

    exact, magnitudes: the sums, and the sums of their terms' magnitudes, float64, of the shape of `ours`.
    """
    wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
    bound = (additions + 6) * unit_roundoff(wide) * magnitudes
    if ours.dtype != wide:
        unit = unit_roundoff(ours.dtype)
        bound = bound * (1 + unit) + unit * exact.abs() + torch.finfo(ours.dtype).smallest_normal * unit
    if ours.shape != exact.shape:
        raise AssertionError(f"the shape is {list(ours.shape)} instead of {list(exact.shape)}")
    wrong = ~((ours.double() - exact).abs() <= bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, first {list(at)}: {ours[at]:.6g} instead of "
            f"{exact[at]:.6g}, bound {bound[at]:.3g}"
        )


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact|| in float64; 0 for two zeros."""
    exact = exact.detach().double()
    error = (ours.detach().to(exact) - exact).norm().item()
    norm = exact.norm().item()
    return error / norm if norm else math.inf if error else 0.0
