"""Cases of the convolutions of any kernel size."""

from __future__ import annotations

from torch.nn import functional as F
from torch.nn import grad as conv_grad

from ._common import Case, Maker, nchw, nhwc

OPTIONS = {
    "7x7 stride 2": {"stride": (2, 2), "padding": (3, 3), "dilation": (1, 1), "groups": 1},
    "5x3 grouped, dilated": {"stride": (1, 1), "padding": (4, 1), "dilation": (2, 1), "groups": 4},
}
SIZES = {
    "7x7 stride 2": {"n": 2, "h": 17, "w": 16, "c": 3, "k": 24, "r": 7, "s": 7},
    "5x3 grouped, dilated": {"n": 2, "h": 11, "w": 8, "c": 16, "k": 24, "r": 5, "s": 3},
}


def _make(options):
    def make(f: Maker, n, h, w, c, k, r, s):
        x, weight = f.activation(n, h, w, c, mean=0.5), f.weight(k, c // options["groups"], r, s)
        return {"x": x, "weight": weight, "dy": f.activation(*nhwc(F.conv2d(nchw(x), weight, None, **options)).shape)}

    return make


def _run(options):
    def run(k, t):
        return {
            "y": k.conv2d(t["x"], t["weight"], **options),
            "dx": k.conv2d_dgrad(t["dy"], t["weight"], t["x"].shape[1:3], **options),
            "dW": k.conv2d_wgrad(t["x"], t["dy"], t["weight"].shape[2:], **options),
        }

    return run


def _stock(options):
    def stock(t):
        x, weight, dy = nchw(t["x"]), t["weight"], nchw(t["dy"])
        return {
            "y": nhwc(F.conv2d(x, weight, None, **options)),
            "dx": nhwc(conv_grad.conv2d_input(x.shape, weight, dy, **options)),
            "dW": conv_grad.conv2d_weight(x, weight.shape, dy, **options),
        }

    return stock


CASES = [
    Case(
        f"conv2d, {name}",
        ("conv2d", "conv2d_dgrad", "conv2d_wgrad"),
        _make(options),
        _run(options),
        _stock(options),
        SIZES[name],
    )
    for name, options in OPTIONS.items()
]
