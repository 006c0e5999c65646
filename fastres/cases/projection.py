"""Cases of the projection shortcut."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._common import Case, Maker, batch_norm, conv, merged, nchw, nhwc, relu_backward, statistics

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
        p, sum_g = k.projection_wgrad(g, x, stride)
        dw, grad, u, v, offset, v_scale, d = k.gram_bwd(p, sum_g, w, bn, count, mean, scatter)
        k.projection_dgrad(t["dx"], g, x, u, v, offset, stride, v_scale=v_scale, d=d)
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


def _make_raw(f: Maker, n, h, w, c, k):
    return {"x": f.activation(n, h, w, c, mean=0.5).relu(), "conv_weight": f.weight(k, c)}


def _run_raw(k, t):
    y, stats = k.projection_conv(t["x"], t["conv_weight"], 2)
    return {"y": y, **merged(stats)}


def _stock_raw(t):
    y = conv(t["x"], t["conv_weight"], 2)
    return {"y": y, **statistics(y)}


def _make_between(f: Maker, n, h, w, c, k):
    x = f.activation(n, h, w, c).relu()
    weight = f.weight(k, c)
    y = conv(x.to(f.acc), weight.to(f.acc), 2).to(f.dtype)
    return {
        "x": x,
        "conv_weight": weight,
        "bn": f.bn(y),
        "residual": f.activation(*y.shape),
        "g": f.activation(*y.shape, mean=0.1),
        "out": f.activation(*y.shape).relu(),
        "dx": f.activation(n, h, w, c),
    }


def _run_between(k, t):
    x, g, w, bn, out = t["x"], t["g"], t["conv_weight"], t["bn"], t["out"]
    p, sum_g = k.projection_wgrad(g, x, 2, out)
    dw, grad, u, v, offset, v_scale, d = k.gram_bwd(p, sum_g, w, bn, g.shape[:3].numel())
    k.projection_dgrad(t["dx"], g, x, u, v, offset, 2, out, relu=True, v_scale=v_scale, d=d)
    dx = t["dx"][:, ::2, ::2]
    forward = k.projection_fprop(x, w, bn, 2, t["residual"], relu=True)
    return {"out": forward, "dW": dw, "dgamma": grad[0], "dbeta": grad[1], "dx": dx}


@torch.enable_grad()
def _stock_between(t):
    x, weight, bn = t["x"].detach().requires_grad_(), t["conv_weight"].detach().requires_grad_(), t["bn"]
    gamma = (bn[2] / bn[1]).requires_grad_()
    beta = (bn[3] + bn[0] * bn[2]).requires_grad_()
    y = conv(x, weight, 2)
    raw = nhwc(torch.batch_norm(nchw(y), gamma, beta, bn[0], bn[1] ** -2, False, 0.0, 0.0, False))
    masked = relu_backward(t["g"], t["out"])
    dx, dw, dgamma, dbeta = torch.autograd.grad(raw, [x, weight, gamma, beta], masked)
    dx = relu_backward((t["dx"] + dx)[:, ::2, ::2].contiguous(), t["x"][:, ::2, ::2].contiguous())
    forward = (batch_norm(y, bn) + t["residual"]).relu().detach()
    return {"out": forward, "dW": dw, "dgamma": dgamma, "dbeta": dbeta, "dx": dx}


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
CASES += [
    Case("projection, raw", ("projection_conv",), _make_raw, _run_raw, _stock_raw, SIZES),
    Case(
        "projection, between two ReLUs",
        ("projection_fprop", "projection_dgrad", "projection_wgrad"),
        _make_between,
        _run_between,
        _stock_between,
        SIZES,
    ),
]
