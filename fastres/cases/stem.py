"""Cases of the stem's BN + ReLU + max-pool."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._common import Case, Maker, affine_grads, batch_norm, batch_norm_backward, nchw, nhwc

SIZES = {"n": 2, "h": 15, "w": 14, "c": 24}


def _make(constant):
    def make(f: Maker, n, h, w, c):
        y = f.activation(n, h, w, c, mean=0.5)
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


CASES = [
    Case(
        f"stem{', constant' if constant else ''}",
        ("stem_pool", "stem_pool_bwd"),
        _make(constant),
        _run(constant),
        _stock(constant),
        SIZES,
    )
    for constant in (False, True)
]
