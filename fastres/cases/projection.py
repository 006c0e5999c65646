"""Cases of the projection shortcut."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._common import Case, Maker, conv, nchw, nhwc, rows

SIZES = {"n": 4, "h": 9, "w": 8, "c": 24, "k": 48}
EPS = 1e-5


def _make(stride):
    def make(f: Maker, n, h, w, c, k):
        x = f.activation(n, h, w, c, mean=0.5).relu()
        return {
            "x": x,
            "conv_weight": f.weight(k, c),
            "weight": f.vector(k),
            "bias": f.vector(k, -0.5, 0.5),
            "running_mean": f.vector(k, -1, 1),
            "running_var": f.vector(k),
            "g": f.activation(n, (h - 1) // stride + 1, (w - 1) // stride + 1, k, mean=0.1),
            "dx": f.activation(n, h, w, c),
        }

    return make


def _run(stride, constant):
    def run(k, t):
        x, g, w = t["x"], t["g"], t["conv_weight"]
        affine, running = (t["weight"], t["bias"]), (t["running_mean"], t["running_var"])
        count = g.shape[:3].numel()
        if constant:
            bn, mean, scatter = k.bn_constants(*running, *affine, EPS, x.dtype), None, None
        else:
            moments = k.projection_gram(x, stride)
            bn, mean, scatter = k.gram_finalize(moments, count, w, *affine, *running, None, 0.1, EPS)
        out = k.projection_fprop(x, w, bn, stride)
        p = k.projection_wgrad(g, x, stride)
        sum_g = rows(g).sum(0, dtype=bn.dtype)
        dw, grad, u, v, offset = k.gram_bwd(p, sum_g, w, bn, count, mean, scatter)
        k.projection_dgrad(t["dx"], g, x, u, v, offset, stride)
        return {
            "out": out,
            "running_mean": t["running_mean"],
            "running_var": t["running_var"],
            "dW": dw,
            "dgamma": grad[0],
            "dbeta": grad[1],
            "dx": t["dx"],
        }

    return run


def _stock(stride, constant):
    @torch.enable_grad()
    def stock(t):
        x, weight, gamma, beta = (t[name].detach().requires_grad_() for name in ("x", "conv_weight", "weight", "bias"))
        raw = nchw(conv(x, weight, stride))
        out = nhwc(F.batch_norm(raw, t["running_mean"], t["running_var"], gamma, beta, not constant, 0.1, EPS))
        dx, dw, dgamma, dbeta = torch.autograd.grad(out, [x, weight, gamma, beta], t["g"])
        return {
            "out": out,
            "running_mean": t["running_mean"],
            "running_var": t["running_var"],
            "dW": dw,
            "dgamma": dgamma,
            "dbeta": dbeta,
            "dx": t["dx"] + dx,
        }

    return stock


CASES = [
    Case(
        f"projection, stride {stride}{', constant' if constant else ''}",
        ("projection_fprop", "projection_dgrad", "projection_wgrad", *(() if constant else ("projection_gram",))),
        _make(stride),
        _run(stride, constant),
        _stock(stride, constant),
        SIZES,
    )
    for stride, constant in ((1, False), (2, False), (2, True))
]
