"""What each kernel of `fastres.kernels` has to move and to compute, by its contract.

A kernel that keeps its contract in one pass reads every argument and writes every result once. Exceptions are where
pixels are skipped and where a tensor is updated in place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import Tensor

from fastres.kernels import reference

from .traffic import tensors, touched

Arguments = dict[str, object]

_STRIDED = {
    "conv1x1": ("x",),
    "conv1x1_dgrad": ("residual",),  # into whose memory dx goes, so that the others stay as they are
    "conv1x1_wgrad": ("x",),
    "expand": ("shortcut",),
    "expand_wgrad": ("x",),
    "projection_conv": ("x",),
    "projection_gram": ("x",),
    "projection_fprop": ("x",),
    "projection_wgrad": ("x",),
    "projection_dgrad": ("x", "dx"),
}
"""Arguments `[N, H, W, C]` of which only every `stride`-th pixel in both directions is touched."""

_UPDATED = {
    "bn_finalize": ("running_mean", "running_var", "num_batches_tracked"),
    "gram_finalize": ("running_mean", "running_var", "num_batches_tracked"),
    "projection_dgrad": ("dx",),
}
"""Arguments that are written as well as read."""

_CHANGED = ("bn_bwd_mask", "add_masked")
"""Kernels whose results are written even where they are arguments; the reference's are not."""


@functools.cache
def _signature(kernel: str) -> inspect.Signature:
    return inspect.signature(getattr(reference, kernel))


def bind(kernel: str, args: tuple, kwargs: dict) -> Arguments:
    """The arguments of a call by name, defaults included."""
    bound = _signature(kernel).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def reads(kernel: str, arguments: Arguments) -> dict[str, int]:
    """Bytes read of each argument that holds tensors."""
    stride = arguments.get("stride", 1)
    seen = {
        name: [t[:, ::stride, ::stride] if name in _STRIDED.get(kernel, ()) else t for t in tensors(value)]
        for name, value in arguments.items()
    }
    return {name: sum(map(touched, tensors)) for name, tensors in seen.items() if tensors}


def writes(kernel: str, arguments: Arguments, result: object) -> int:
    """Bytes written: results that are not arguments handed on, and what is updated in place."""
    if kernel == "conv1x1_dgrad" and arguments["stride"] > 1 and arguments["residual"] is not None:
        return reads(kernel, arguments)["residual"]
    given = {id(t) for value in arguments.values() for t in tensors(value)}
    made = sum(touched(t) for t in tensors(result) if id(t) not in given or kernel in _CHANGED)
    read = reads(kernel, arguments)
    return made + sum(read.get(name, 0) for name in _UPDATED.get(kernel, ()))


def _pixels(t: Tensor) -> int:
    return t.shape[:-1].numel()


def _conv(output: Tensor, weight_shape: tuple[int, ...]) -> int:
    """Of a convolution `[K, C/groups, R, S]` with this output `[N, H, W, K]`, or of its dgrad or wgrad."""
    return 2 * output.numel() * weight_shape[1:].numel()


def _square(rows: int, size: int) -> int:
    """Of a Gram matrix `[size, size]` over rows: symmetric, so the upper half with the diagonal."""
    return rows * size * (size + 1)


def _small_matrices(t: Arguments, result: object) -> int:
    """W S, or W S and W^T (..W), with S or V `[K, K]`; none for constant statistics."""
    k = t["conv_weight"].shape[1]
    products = 1 if "moments" in t else 2 if t["scatter"] is not None else 0
    return 2 * products * t["conv_weight"].numel() * k


def _input_grad(t: Arguments, rows: int) -> int:
    """g u + a v + d*a + k."""
    return 2 * rows * (t["u"].numel() + (0 if t["v"] is None else t["v"].numel()))


_FLOPS: dict[str, Callable[[Arguments, object], int]] = {
    "conv1x1": lambda t, r: 2 * _pixels(r[0]) * t["weight"].numel(),
    "conv1x1_dgrad": lambda t, r: 2 * _pixels(t["g"]) * t["weight"].numel(),
    "conv1x1_wgrad": lambda t, r: 2 * _pixels(t["g"]) * r.numel(),
    "conv1x1_bwd": lambda t, r: 4 * _pixels(t["g"]) * t["weight"].numel(),
    "conv2d": lambda t, r: _conv(r, t["weight"].shape),
    "conv3x3": lambda t, r: _conv(r[0], t["weight"].shape),
    **{name: lambda t, r: _conv(t["dy"], t["weight"].shape) for name in ("conv2d_dgrad", "conv3x3_dgrad")},
    **{name: lambda t, r: _conv(t["dy"], r.shape) for name in ("conv2d_wgrad", "conv3x3_wgrad")},
    "gram": lambda t, r: _square(_pixels(t["y"]), t["y"].shape[-1]),
    "expand": lambda t, r: (
        2 * _pixels(r) * sum(w.numel() for w in (t["weight"], t["shortcut_weight"]) if w is not None)
    ),
    "expand_wgrad": lambda t, r: 2 * _pixels(t["g"]) * sum(p.numel() for p in (r[0], r[3]) if p is not None),
    "expand_dgrad": lambda t, r: _input_grad(t, _pixels(t["g"])),
    "projection_gram": lambda t, r: _square(_pixels(t["x"][:, :: t["stride"], :: t["stride"]]), t["x"].shape[-1]),
    "projection_conv": lambda t, r: 2 * _pixels(r[0]) * t["weight"].numel(),
    "projection_fprop": lambda t, r: 2 * _pixels(r) * t["weight"].numel(),
    "projection_wgrad": lambda t, r: 2 * _pixels(t["g"]) * r[0].numel(),
    "projection_dgrad": lambda t, r: _input_grad(t, _pixels(t["g"])),
    "gram_finalize": _small_matrices,
    "gram_bwd": _small_matrices,
}
"""Matrix products; element-wise and reduction kernels have none that count."""


def flops(kernel: str, arguments: Arguments, result: object) -> int:
    """FLOPs of the kernel's matrix products, a multiply-add being two."""
    formula = _FLOPS.get(kernel)
    return formula(arguments, result) if formula else 0
