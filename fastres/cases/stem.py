"""Cases of the stem's BN + ReLU + max-pool: both directions with the sums between them, and each kernel alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import reference
from fastres.kernels.reference.stem import NO_GRADIENT

from ._common import Case, Maker, affine_grads, batch_norm, batch_norm_backward, nchw, nhwc

SIZES = {"n": 2, "h": 15, "w": 14, "c": 24}
STATIC = tuple(
    (dtype, sizes)
    for dtype in (torch.bfloat16, torch.float32)
    for sizes in (
        {"n": 256, "h": 112, "w": 112, "c": 64},
        *({"n": 256, "h": 32, "w": 32, "c": c} for c in (16, 24, 3, 28, 100)),
    )
)
"""Every tile there is, with 24 channels for the one 32 wide, as 16 does not divide them; the last three, which do not
fill 16 bytes in bfloat16, in the tiles of that form."""


def _make(constant):
    def make(f: Maker, n, h, w, c, mean=0.5):
        y = f.activation(n, h, w, c, mean=mean)
        bn = f.constants(y) if constant else f.bn(y)
        return {"y": y, "bn": bn, "g": f.activation(n, (h + 1) // 2, (w + 1) // 2, c, mean=0.1)}

    return make


def _run(constant):
    def run(k, t):
        y, bn = t["y"], t["bn"]
        out, y_argmax, argmax = k.stem_pool(y, bn)
        sums, _ = k.bn_bwd_reduce(t["g"], y_argmax, bn, out=out)
        grad = k.bn_bwd_finalize(sums, bn, None if constant else y.shape[:3].numel())
        dy = k.stem_pool_bwd(t["g"], argmax, y.shape[1:3], bn, grad, y=None if constant else y)
        return {"out": out, "dy": dy, **affine_grads(k, sums, bn)}

    return run


def _stock(constant):
    @torch.enable_grad()
    def stock(t):
        z = batch_norm(t["y"], t["bn"]).detach().requires_grad_()
        out = nhwc(F.max_pool2d(nchw(z.relu()), 3, 2, 1))
        (dz,) = torch.autograd.grad(out, z, t["g"])
        dy, dgamma, dbeta = batch_norm_backward(dz, t["y"], t["bn"], constant)
        return {"out": out, "dy": dy, "dgamma": dgamma, "dbeta": dbeta}

    return stock


def _make_forward(f: Maker, n, h, w, c, mean=0.5):
    y = f.activation(n, h, w, c, mean=mean)
    return {"y": y, "bn": f.bn(y)}


def _run_forward(k, t):
    return {"out": k.stem_pool(t["y"], t["bn"])[0]}


def _stock_forward(t):
    return {"out": nhwc(F.max_pool2d(nchw(batch_norm(t["y"], t["bn"]).relu()), 3, 2, 1))}


def _make_backward(constant):
    def make(f: Maker, n, h, w, c, mean=0.5):
        t = _make(constant)(f, n, h, w, c, mean)
        y, bn = t["y"], t["bn"]
        out, y_argmax, t["argmax"] = reference.stem_pool(y, bn)
        t["input_hw"] = h, w
        if constant:
            return t | {"y": None, "grad": None}
        # The sums are of the pooled tensors, the statistics of y.
        sums, _ = reference.bn_bwd_reduce(t["g"].double(), y_argmax.double(), bn.double(), out=out.double())
        grad = reference.bn_bwd_finalize(sums, bn.double(), max(1, n * h * w))
        return t | {"grad": grad.to(bn.dtype)}

    return make


def _run_backward(k, t):
    return {"dy": k.stem_pool_bwd(**t)}


def _stock_backward(t):
    g, bn, (h, w) = t["g"], t["bn"], t["input_hw"]
    y = g.new_zeros(*g.shape[:1], h, w, g.shape[3]) if t["y"] is None else t["y"]
    through = g.masked_fill(t["argmax"] == NO_GRADIENT, 0)
    dz = torch.ops.aten.max_pool2d_with_indices_backward(
        nchw(through), nchw(y), [3, 3], [2, 2], [1, 1], [1, 1], False, nchw(_indices(t["argmax"], w))
    )
    return {"dy": batch_norm_backward(nhwc(dz), y, bn, constant=t["grad"] is None)[0]}


def _indices(argmax: Tensor, width: int) -> Tensor:
    """ATen's, of a pixel in its image. Where there is none any will do: nothing flows there."""
    tap = argmax.long() % NO_GRADIENT
    ho, wo = (torch.arange(size, device=argmax.device) for size in argmax.shape[1:3])
    row, column = 2 * ho[:, None, None] - 1 + tap // 3, 2 * wo[:, None] - 1 + tap % 3
    return (row.clamp_min(0) * width + column.clamp_min(0)).where(argmax != NO_GRADIENT, 0)


CASES = [
    *(
        Case(
            f"stem{', constant' if constant else ''}",
            ("stem_pool", "stem_pool_bwd"),
            _make(constant),
            _run(constant),
            _stock(constant),
            SIZES,
        )
        for constant in (False, True)
    ),
    Case("stem_pool", ("stem_pool",), _make_forward, _run_forward, _stock_forward, SIZES, STATIC),
    *(
        Case(
            f"stem_pool_bwd{', constant' if constant else ''}",
            ("stem_pool_bwd",),
            _make_backward(constant),
            _run_backward,
            _stock_backward,
            SIZES,
            STATIC,
        )
        for constant in (False, True)
    ),
]
