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
    relu_backward,
    rows,
)

SIZES = {"n": 4, "h": 9, "w": 8, "k": 24, "c": 96, "s": 40}
EPS = 1e-5
_BF16, _F32 = torch.bfloat16, torch.float32
_WIDTHS = [{"n": 256, "h": h, "w": h, "k": k, "c": 4 * k, "s": 2 * k} for h, k in ((56, 64), (28, 128), (14, 256))]
_GENERAL = {"n": 256, "h": 14, "w": 14, "k": 24, "c": 100, "s": 20}
STATIC = (*((_BF16, sizes) for sizes in _WIDTHS), (_BF16, _GENERAL), (_F32, _WIDTHS[0]))
"""Every tile there is, channel counts that TMA does not take, and float32."""


def _make(stride):
    def make(f: Maker, n, h, w, k, c, s=None):
        y = f.activation(n, h, w, k, mean=0.5)
        t = {
            "y": y,
            "bn": f.bn(y),
            "conv_weight": f.weight(c, k),
            "weight": f.vector(c),
            "bias": f.vector(c, -0.5, 0.5),
            "running_mean": f.vector(c, -1, 1),
            "running_var": f.vector(c),
            "g": f.activation(n, h, w, c, mean=0.1),
        }
        if stride is None:
            return t | {"shortcut": f.activation(n, h, w, c)}
        # One pixel fewer than stride*h: the sizes of which the last is strided over too.
        x = f.activation(n, stride * (h - 1) + 1, stride * w, s).relu()
        weight = f.weight(c, s)
        return t | {"x": x, "shortcut_weight": weight, "shortcut_bn": f.bn(conv(x, weight, stride))}

    return make


def _run(constant, stride=None):
    """stride: of a projection as a second product."""

    def run(k, t):
        y, bn, running = t["y"], t["bn"], (t["running_mean"], t["running_var"])
        count = y.shape[:3].numel()
        if constant:
            out_bn, mean, scatter = k.bn_constants(*running, t["weight"], t["bias"], EPS, y.dtype), None, None
        else:
            affine = t["weight"], t["bias"]
            moments = k.gram(y, bn)
            out_bn, mean, scatter = k.gram_finalize(moments, count, t["conv_weight"], *affine, *running, None, 0.1, EPS)
        if stride is None:
            out = k.expand(y, bn, t["conv_weight"], out_bn, t["shortcut"])
            p, sum_g, g, p_x = k.expand_wgrad(t["g"], out, y, bn)
        else:
            projection = {"shortcut_bn": t["shortcut_bn"], "shortcut_weight": t["shortcut_weight"], "stride": stride}
            out = k.expand(y, bn, t["conv_weight"], out_bn, t["x"], **projection)
            p, sum_g, g, p_x = k.expand_wgrad(t["g"], out, y, bn, x=t["x"], stride=stride)
        small = p, sum_g, t["conv_weight"], out_bn, count, mean, scatter
        dw, grad, u, v, offset, v_scale, d = k.gram_bwd(*small)
        dz, sums = k.expand_dgrad(g, u, v, offset, y, bn, v_scale, d)
        return {
            "out": out,
            "running_mean": t["running_mean"],
            "running_var": t["running_var"],
            "g'": g,
            **({} if p_x is None else {"Px": p_x}),
            "dW": dw,
            "dgamma": grad[0],
            "dbeta": grad[1],
            "dz": dz,
            **{f"inner {name}": value for name, value in affine_grads(k, sums, bn).items()},
        }

    return run


def _stock(constant, stride=None):
    @torch.enable_grad()
    def stock(t):
        z = batch_norm(t["y"], t["bn"]).detach().requires_grad_()
        weight, gamma, beta = (t[name].detach().requires_grad_() for name in ("conv_weight", "weight", "bias"))
        raw = nchw(conv(z.relu(), weight))
        normed = F.batch_norm(raw, t["running_mean"], t["running_var"], gamma, beta, not constant, 0.1, EPS)
        results = {}
        if stride is None:
            shortcut = t["shortcut"]
        else:
            shortcut = batch_norm(conv(t["x"], t["shortcut_weight"], stride), t["shortcut_bn"]).detach()
        summed = nhwc(normed) + shortcut
        out = summed.relu()
        g, dw, dgamma, dbeta, dz = torch.autograd.grad(out, [summed, weight, gamma, beta, z], t["g"])
        if stride is not None:
            x_s = t["x"][:, ::stride, ::stride]
            results["Px"] = torch.nn.grad.conv2d_weight(
                nchw(x_s), (*t["shortcut_weight"].shape, 1, 1), nchw(g)
            ).flatten(1)
        _, inner_dgamma, inner_dbeta = batch_norm_backward(dz, t["y"], t["bn"])
        return results | {
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


def _make_forward(form):
    def make(f: Maker, n, h, w, k, c, s=None):
        t = _make(form if isinstance(form, int) else None)(f, n, h, w, k, c, s)
        kept = ("y", "bn", "conv_weight", "shortcut", "x", "shortcut_weight", "shortcut_bn")
        t = {name: t[name] for name in kept if name in t} | {"out_bn": f.bn(f.activation(64, 1, 1, c))}
        return t if form != "stored" else t | {"shortcut_bn": f.bn(t["shortcut"])}

    return make


def _run_forward(form):
    def run(k, t):
        second = {name: t[name] for name in ("shortcut_bn", "shortcut_weight") if name in t}
        if isinstance(form, int):
            second["stride"] = form
        shortcut = t["x"] if isinstance(form, int) else t["shortcut"]
        return {"out": k.expand(t["y"], t["bn"], t["conv_weight"], t["out_bn"], shortcut, **second)}

    return run


def _stock_forward(form):
    def stock(t):
        raw = conv(batch_norm(t["y"], t["bn"]).relu(), t["conv_weight"])
        shortcut = conv(t["x"], t["shortcut_weight"], form) if isinstance(form, int) else t["shortcut"]
        if form is not None:
            shortcut = batch_norm(shortcut, t["shortcut_bn"])
        return {"out": (batch_norm(raw, t["out_bn"]) + shortcut).relu()}

    return stock


def _make_wgrad(stride):
    def make(f: Maker, n, h, w, k, c, s=None):
        t = _make(stride)(f, n, h, w, k, c, s)
        return {name: t[name] for name in ("y", "bn", "g", "x") if name in t} | {"out": f.activation(n, h, w, c).relu()}

    return make


def _run_wgrad(stride, relu_behind):
    def run(k, t):
        second = {} if stride is None else {"x": t["x"], "stride": stride}
        p, sum_g, g, p_x = k.expand_wgrad(t["g"], t["out"] if relu_behind else None, t["y"], t["bn"], **second)
        results = {"P": p, "sum g'": sum_g, **({"g'": g} if relu_behind else {})}
        return results if p_x is None else results | {"Px": p_x}

    return run


def _stock_wgrad(stride, relu_behind):
    def stock(t):
        g = relu_backward(t["g"], t["out"]) if relu_behind else t["g"]
        wide = nchw(g)

        def product(a):
            return torch.nn.grad.conv2d_weight(nchw(a), (g.shape[-1], a.shape[-1], 1, 1), wide).flatten(1)

        results = {"P": product(batch_norm(t["y"], t["bn"]).relu()), "sum g'": rows(g).sum(0)}
        if relu_behind:
            results["g'"] = g
        return results if stride is None else results | {"Px": product(t["x"][:, ::stride, ::stride].contiguous())}

    return stock


def _make_dgrad(constant):
    def make(f: Maker, n, h, w, k, c, s=None):
        y = f.activation(n, h, w, k, mean=0.5)
        t = {"y": y, "bn": f.bn(y), "g": f.activation(n, h, w, c, mean=0.1), "u": f.weight(c, k)}
        if constant:
            return t
        t |= {"v": f.weight(k, k), "k": f.vector(k, -0.5, 0.5), "d": f.vector(k, -0.5, 0.5)}
        # What only float16 has.
        return t if f.dtype != torch.float16 else t | {"v_scale": torch.full((), 0.25, device=f.device)}

    return make


def _run_dgrad(k, t):
    of_a = (t.get(name) for name in ("v_scale", "d"))
    dz, sums = k.expand_dgrad(t["g"], t["u"], t.get("v"), t.get("k"), t["y"], t["bn"], *of_a)
    return {"dz": dz, **affine_grads(k, sums, t["bn"])}


def _stock_dgrad(t):
    a = batch_norm(t["y"], t["bn"]).relu()
    da = t["g"] @ t["u"]
    if "v" in t:
        da = da + (a @ t["v"] * t.get("v_scale", 1) + t["d"] * a + t["k"]).to(da.dtype)
    dz = relu_backward(da, a)
    _, dgamma, dbeta = batch_norm_backward(dz, t["y"], t["bn"])
    return {"dz": dz, "dgamma": dgamma, "dbeta": dbeta}


_KERNELS = ("expand", "expand_dgrad", "expand_wgrad", "gram_bwd")
_FOLDED = (*_KERNELS, "gram", "gram_finalize")
_FORMS = {None: "", "stored": ", stored projection", 1: ", projection of stride 1", 2: ", projection of stride 2"}

CASES = [
    Case("expand", _FOLDED, _make(None), _run(False), _stock(False), SIZES),
    Case("expand, constant", (*_KERNELS, "bn_constants"), _make(None), _run(True), _stock(True), SIZES),
    Case("expand, projection", _FOLDED, _make(2), _run(False, 2), _stock(False, 2), SIZES),
    *(
        Case(
            f"expand forward{name}",
            ("expand",),
            _make_forward(form),
            _run_forward(form),
            _stock_forward(form),
            SIZES,
            static,
            tiles=tiles,
        )
        for (form, name), (static, tiles) in zip(
            _FORMS.items(), ((STATIC, 2), (STATIC[:2], 1), ((), 1), (STATIC[1:], 2)), strict=True
        )
    ),
    *(
        Case(
            f"expand_wgrad{_FORMS[stride]}{'' if relu_behind else ', gradient masked before'}",
            ("expand_wgrad",),
            _make_wgrad(stride),
            _run_wgrad(stride, relu_behind),
            _stock_wgrad(stride, relu_behind),
            SIZES,
            static,
            tiles=2 if static is STATIC else 1,
        )
        for stride, relu_behind, static in (
            (None, True, STATIC),
            (None, False, STATIC[1:3]),
            (1, True, STATIC[:1]),
            (2, True, STATIC[1:3]),
            (2, False, ()),
        )
    ),
    *(
        Case(
            f"expand_dgrad{', constant' if constant else ''}",
            ("expand_dgrad",),
            _make_dgrad(constant),
            _run_dgrad,
            _stock_dgrad,
            SIZES,
            STATIC[:1] if constant else STATIC,
            tiles=1 if constant else 2,
        )
        for constant in (False, True)
    ),
]
