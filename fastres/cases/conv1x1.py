"""Cases of the 1x1 convolutions."""

from __future__ import annotations

import torch
from torch.nn import grad as conv_grad

from ._common import (
    Case,
    Maker,
    backward_vectors,
    batch_norm,
    batch_norm_backward,
    conv,
    merged,
    nchw,
    nhwc,
    relu_backward,
    statistics,
)

SIZES = {"n": 2, "h": 9, "w": 8, "c": 24, "k": 40}
_BF16, _F32 = torch.bfloat16, torch.float32
_WIDTHS = [{"n": 256, "h": h, "w": h, "c": 4 * k, "k": k} for h, k in ((56, 64), (28, 128), (14, 256))]
# The input of layer1's first block is as wide as its output: the dx of fewest channels.
_NARROW = {"n": 256, "h": 56, "w": 56, "c": 64, "k": 64}
_GENERAL = {"n": 256, "h": 14, "w": 14, "c": 100, "k": 36}
STATIC = (*((_BF16, sizes) for sizes in (*_WIDTHS, _NARROW, _GENERAL)), (_F32, _NARROW))
"""Every tile there is, channel counts that TMA does not take, and float32."""
FORM = ((_BF16, _WIDTHS[1]),)
"""For what differs from the main form of a kernel in its loads or its epilogue."""
ONE_PASS = tuple((dtype, sizes) for dtype, sizes in STATIC if dtype == _BF16 and sizes["k"] <= 128)


def _forward(stride, prologue=False):
    def make(f: Maker, n, h, w, c, k):
        x = f.activation(n, h, w, c, mean=0.5)
        return {"x": x, "weight": f.weight(k, c), "stride": stride} | ({"bn": f.bn(x)} if prologue else {})

    return make


def _run_forward(k, t):
    y, stats = k.conv1x1(**t)
    return {"y": y, **merged(stats)}


def _stock_forward(t):
    x = batch_norm(t["x"], t["bn"]).relu() if "bn" in t else t["x"]
    y = conv(x, t["weight"], t["stride"])
    return {"y": y, **statistics(y)}


def _backward(stride, residual, form, mask=False):
    def make(f: Maker, n, h, w, c, k):
        x = f.activation(n, h, w, c)
        weight = f.weight(k, c)
        y = (conv(x, weight, stride) + f.activation(k)).contiguous()
        g = f.activation(*y.shape)
        t = {
            "x": x,
            "weight": weight,
            "g": g,
            "residual": f.activation(*x.shape) if residual else None,
            "stride": stride,
            "mask": mask,
        }
        if form == "batch":
            bn = f.bn(y)
            t |= {"y": y, "bn": bn, "grad": backward_vectors(g, y, bn)}
        elif form == "constant":
            t["bn"] = f.constants(y)
        return t

    return make


def _run_backward(k, t):
    through = {name: t[name] for name in ("g", "bn", "grad", "y", "stride") if name in t}
    mask = t["x"] if t["mask"] else None
    dx = k.conv1x1_dgrad(weight=t["weight"], input_hw=t["x"].shape[1:3], residual=t["residual"], mask=mask, **through)
    return {"dx": dx, "dW": k.conv1x1_wgrad(t["x"], **through)}


def _run_one_pass(k, t):
    through = {name: t[name] for name in ("g", "bn", "grad", "y", "residual", "mask") if name in t}
    dx, dw = k.conv1x1_bwd(t["x"], weight=t["weight"], **through)
    return {"dx": dx, "dW": dw}


def _stock_backward(t):
    dy = t["g"]
    if "bn" in t:
        dy, _, _ = batch_norm_backward(dy, t.get("y", dy), t["bn"], constant="y" not in t)
    dy = nchw(dy)
    x, weight, stride = nchw(t["x"]), t["weight"][:, :, None, None], t["stride"]
    dx = nhwc(conv_grad.conv2d_input(x.shape, weight, dy, stride))
    if t["residual"] is not None:
        dx = dx + t["residual"]
    return {
        "dx": relu_backward(dx, t["x"]) if t["mask"] else dx,
        "dW": conv_grad.conv2d_weight(x, weight.shape, dy, stride).flatten(1),
    }


_FORMS = {"batch": "", "constant": ", constant", "plain": ", dy given"}
"""Whether dy is formed on load, from what statistics."""


def _backward_name(how, stride, residual, form, mask):
    stride = "" if how else f", stride {stride}"
    return f"conv1x1 backward{how}{stride}{', residual' if residual else ''}{', masked' if mask else ''}{_FORMS[form]}"


CASES = [
    *(
        Case(
            f"conv1x1, stride {stride}{', BN + ReLU on load' if prologue else ''}",
            ("conv1x1",),
            _forward(stride, prologue),
            _run_forward,
            _stock_forward,
            SIZES,
            FORM if stride == 2 or prologue else STATIC,
            tiles=1 if stride == 2 or prologue else 2,
        )
        for stride, prologue in ((1, False), (2, False), (1, True), (2, True))
    ),
    *(
        Case(
            _backward_name("", stride, residual, form, mask),
            ("conv1x1_dgrad", "conv1x1_wgrad"),
            _backward(stride, residual, form, mask),
            _run_backward,
            _stock_backward,
            SIZES,
            static,
            tiles=2 if static is STATIC else 1,
        )
        for stride, residual, form, mask, static in (
            (1, False, "batch", False, FORM),
            (1, True, "batch", False, FORM),
            (1, True, "batch", True, STATIC),
            (1, False, "plain", True, ()),
            (2, True, "batch", False, FORM),
            (2, True, "batch", True, ()),
            (1, True, "constant", False, FORM),
            (1, True, "plain", False, FORM),
            (2, False, "plain", False, ()),
        )
    ),
    *(
        Case(
            _backward_name(" in one pass", 1, residual, form, mask),
            ("conv1x1_bwd",),
            _backward(1, residual, form, mask),
            _run_one_pass,
            _stock_backward,
            SIZES,
            static,
            tiles=2 if static is ONE_PASS else 1,
        )
        for residual, form, mask, static in (
            (False, "batch", False, FORM),
            (True, "batch", False, FORM),
            (True, "batch", True, ONE_PASS),
            (True, "constant", True, ()),
            (False, "plain", False, ()),
        )
    ),
]
