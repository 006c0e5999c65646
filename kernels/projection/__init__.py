"""The strided 1x1 projection shortcut in C++: Gram, fprop, wgrad and dgrad read the strided pixels where they lie.

x is dense NHWC `[N, H, W, C]`, float32, float64 or bfloat16; x_s = x[:, ::stride, ::stride] has
Ho = (H - 1) // stride + 1 rows and Wo = (W - 1) // stride + 1 columns of pixels. "acc" is float64 for float64 and else
float32. Any stride >= 1 and any sizes, an empty batch included. Results have the same bits from run to run and for any
number of threads. Arguments that do not fit raise RuntimeError with the argument's name.

The library is built with the package (setup.py) and loaded on the first call; `available()` says whether it is there.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from ..reference.gram import Gram

__all__ = ["available", "projection_dgrad", "projection_fprop", "projection_gram", "projection_wgrad"]

_FOLDER = Path(__file__).parent


@functools.cache
def available() -> str | None:
    """None when the library is there and loads, else the reason. The first call loads it and registers the fakes."""
    try:
        build = json.loads((_FOLDER / "_build.json").read_text())
    except FileNotFoundError:
        return "not built: the package was not installed by its setup.py (pip install --no-build-isolation -e .)"
    if not build["built"]:
        return f"not built: {build['reason']}"
    library = _FOLDER / build["library"]
    if not library.exists():
        return f"not built: {library} is missing, install the package again"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name}, built for torch {build['torch']}, does not load in torch {torch.__version__}: {error}"
    _register_fakes()
    return None


def projection_gram(x: Tensor, stride: int) -> Gram:
    """Second moments of x_s around a pivot, from which a projection's batch statistics follow without its output.

    Returns gram `[C, C]` = sum (x_s - pivot)^T (x_s - pivot), total `[C]` = sum (x_s - pivot) and pivot `[C]`, the mean
    of the first 64 rows of x_s or of all when there are fewer; all in acc. The pivot keeps the variance right where the
    mean is a thousand standard deviations.
    """
    return Gram(*_ops().gram(x, stride))


def projection_fprop(x: Tensor, weight: Tensor, bn: Tensor, stride: int) -> Tensor:
    """scale * (x_s weight^T) + shift, `[N, Ho, Wo, K]`, summed in acc and rounded once to x's dtype.

    weight `[K, C]` in x's dtype; bn `[4, K]` in acc with rows mean, rstd, scale, shift.
    """
    return _ops().fprop(x, weight, bn, stride)


def projection_wgrad(g: Tensor, x: Tensor, stride: int) -> Tensor:
    """g^T x_s, `[K, C]` in acc; g `[N, Ho, Wo, K]` in x's dtype."""
    return _ops().wgrad(g, x, stride)


def projection_dgrad(
    dx: Tensor, g: Tensor, x: Tensor, u: Tensor, v: Tensor | None, k: Tensor | None, stride: int
) -> None:
    """dx[:, ::stride, ::stride] += g u + x_s v + k, in place; summed in acc and rounded once to dx's dtype.

    dx and x `[N, H, W, C]`, g `[N, Ho, Wo, K]`, u `[K, C]`, v `[C, C]` or None in x's dtype; k `[C]` in acc or None.
    The other pixels of dx stay as they are.
    """
    _ops().dgrad(dx, g, x, u, v, k, stride)


def _ops():
    reason = available()
    if reason is not None:
        raise RuntimeError(f"the projection extension is not available: {reason}")
    return torch.ops.fastres_projection


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _register_fakes() -> None:
    register = torch.library.register_fake

    @register("fastres_projection::gram")
    def _(x, stride):
        c = x.shape[3]
        return tuple(x.new_empty(size, dtype=_acc(x)) for size in ((c, c), (c,), (c,)))

    @register("fastres_projection::fprop")
    def _(x, weight, bn, stride):
        n, h, w, _ = x.shape
        return x.new_empty(n, (h + stride - 1) // stride, (w + stride - 1) // stride, weight.shape[0])

    @register("fastres_projection::wgrad")
    def _(g, x, stride):
        return x.new_empty(g.shape[3], x.shape[3], dtype=_acc(x))

    @register("fastres_projection::dgrad")
    def _(dx, g, x, u, v, k, stride):
        return None
