"""Cases of the expanding 1x1 conv with its batch norm, shortcut and ReLU: Gram folding, both directions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._common import (
    Case,
    Maker,
    affine_grads,
    batch_norm,
    batch_norm_backward,
    conv,
    nchw,
    nhwc,
)

SIZES = {"n": 4, "h": 9, "w": 8, "k": 24, "c": 96}
EPS = 1e-5


def _make(f: Maker, n, h, w, k, c):
    y = f.activation(n, h, w, k, mean=0.5)
    return {
        "y": y,
        "bn": f.bn(y),
        "conv_weight": f.weight(c, k),
        "weight": f.vector(c),
        "bias": f.vector(c, -0.5, 0.5),
        "running_mean": f.vector(c, -1, 1),
        "running_var": f.vector(c),
        "shortcut": f.activation(n, h, w, c),
        "g": f.activation(n, h, w, c, mean=0.1),
    }


def _run(constant):
    def run(k, t):
        y, bn, running = t["y"], t["bn"], (t["running_mean"], t["running_var"])
        count = y.shape[:3].numel()
        if constant:
            out_bn, mean, scatter = k.bn_constants(*running, t["weight"], t["bias"], EPS, y.dtype), None, None
        else:
            affine = t["weight"], t["bias"]
            moments = k.gram(y, bn)
            out_bn, mean, scatter = k.gram_finalize(moments, count, t["conv_weight"], *affine, *running, None, 0.1, EPS)
        out = k.expand(y, bn, t["conv_weight"], out_bn, t["shortcut"])
        p, sum_g, g = k.expand_wgrad(t["g"], out, y, bn)
        dw, grad, u, v, offset = k.gram_bwd(p, sum_g, t["conv_weight"], out_bn, count, mean, scatter)
        dz, sums = k.expand_dgrad(g, u, v, offset, y, bn)
        return {
            "out": out,
            "running_mean": t["running_mean"],
            "running_var": t["running_var"],
            "g'": g,
            "dW": dw,
            "dgamma": grad[0],
            "dbeta": grad[1],
            "dz": dz,
            **{f"inner {name}": value for name, value in affine_grads(k, sums, bn).items()},
        }

    return run


def _stock(constant):
    @torch.enable_grad()
    def stock(t):
        z = batch_norm(t["y"], t["bn"]).detach().requires_grad_()
        weight, gamma, beta = (t[name].detach().requires_grad_() for name in ("conv_weight", "weight", "bias"))
        raw = nchw(conv(z.relu(), weight))
        normed = F.batch_norm(raw, t["running_mean"], t["running_var"], gamma, beta, not constant, 0.1, EPS)
        summed = nhwc(normed) + t["shortcut"]
        out = summed.relu()
        g, dw, dgamma, dbeta, dz = torch.autograd.grad(out, [summed, weight, gamma, beta, z], t["g"])
        _, inner_dgamma, inner_dbeta = batch_norm_backward(dz, t["y"], t["bn"])
        return {
            "out": out,
            "running_mean": t["running_mean"],
            "running_var": t["running_var"],
            "g'": g,
            "dW": dw,
            "dgamma": dgamma,
            "dbeta": dbeta,
            "dz": dz,
            "inner dgamma": inner_dgamma,
            "inner dbeta": inner_dbeta,
        }

    return stock


_KERNELS = ("expand", "expand_dgrad", "expand_wgrad", "gram_bwd")

CASES = [
    Case("expand", (*_KERNELS, "gram", "gram_finalize"), _make, _run(False), _stock(False), SIZES),
    Case("expand, constant", (*_KERNELS, "bn_constants"), _make, _run(True), _stock(True), SIZES),
]
