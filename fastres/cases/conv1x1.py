"""Cases of the 1x1 convolutions."""

from __future__ import annotations

from torch.nn import grad as conv_grad

from ._common import Case, Maker, backward_vectors, batch_norm_backward, conv, merged, nchw, nhwc, statistics

SIZES = {"n": 2, "h": 9, "w": 8, "c": 24, "k": 40}


def _forward(stride):
    def make(f: Maker, n, h, w, c, k):
        return {"x": f.activation(n, h, w, c, mean=0.5), "weight": f.weight(k, c), "stride": stride}

    return make


def _run_forward(k, t):
    y, stats = k.conv1x1(**t)
    return {"y": y, **merged(stats)}


def _stock_forward(t):
    y = conv(t["x"], t["weight"], t["stride"])
    return {"y": y, **statistics(y)}


def _backward(stride, residual, form):
    def make(f: Maker, n, h, w, c, k):
        x = f.activation(n, h, w, c)
        weight = f.weight(k, c)
        y = conv(x, weight, stride) + f.activation(k)
        g = f.activation(*y.shape)
        t = {
            "x": x,
            "weight": weight,
            "g": g,
            "residual": f.activation(*x.shape) if residual else None,
            "stride": stride,
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
    dx = k.conv1x1_dgrad(weight=t["weight"], input_hw=t["x"].shape[1:3], residual=t["residual"], **through)
    return {"dx": dx, "dW": k.conv1x1_wgrad(t["x"], **through)}


def _stock_backward(t):
    dy = t["g"]
    if "bn" in t:
        dy, _, _ = batch_norm_backward(dy, t.get("y", dy), t["bn"], constant="y" not in t)
    dy = nchw(dy)
    x, weight, stride = nchw(t["x"]), t["weight"][:, :, None, None], t["stride"]
    dx = nhwc(conv_grad.conv2d_input(x.shape, weight, dy, stride))
    return {
        "dx": dx if t["residual"] is None else dx + t["residual"],
        "dW": conv_grad.conv2d_weight(x, weight.shape, dy, stride).flatten(1),
    }


_FORMS = {"batch": "", "constant": ", constant", "plain": ", dy given"}
"""Whether dy is formed on load, from what statistics."""

CASES = [
    *(
        Case(f"conv1x1, stride {stride}", ("conv1x1",), _forward(stride), _run_forward, _stock_forward, SIZES)
        for stride in (1, 2)
    ),
    *(
        Case(
            f"conv1x1 backward, stride {stride}{', residual' if residual else ''}{_FORMS[form]}",
            ("conv1x1_dgrad", "conv1x1_wgrad"),
            _backward(stride, residual, form),
            _run_backward,
            _stock_backward,
            SIZES,
        )
        for stride, residual, form in (
            (1, False, "batch"),
            (1, True, "batch"),
            (2, True, "batch"),
            (1, True, "constant"),
            (1, True, "plain"),
            (2, False, "plain"),
        )
    ),
]
