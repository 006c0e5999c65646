"""Cases of the 3x3 convolutions of residual blocks."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from ._common import (
    Case,
    Maker,
    affine_grads,
    batch_norm,
    batch_norm_backward,
    merged,
    nchw,
    nhwc,
    relu_backward,
    statistics,
)

SIZES = {"n": 2, "h": 9, "w": 8, "c": 24, "k": 16}
_BF16, _F32 = torch.bfloat16, torch.float32


def _sizes(h, w, c, k):
    return {"n": 2, "h": h, "w": w, "c": c, "k": k}


# In the boxes that cover ResNet-50's maps at 224x224, of which these small ones are a tile; all that needs masks; then
# channels that TMA does not take, and float32.
_BOXES = (_sizes(8, 8, 64, 64), _sizes(4, 4, 128, 128), _sizes(2, 2, 64, 256), _sizes(1, 1, 128, 64))
_RAGGED = _sizes(7, 9, 24, 80)
_GENERAL = _sizes(5, 7, 36, 20)
STATIC = (*((_BF16, sizes) for sizes in (*_BOXES, _RAGGED, _GENERAL)), (_F32, _sizes(5, 7, 64, 64)))
# Even sizes, which TMA takes by pairs; odd ones; and channels that do not fill a load.
STRIDED = tuple(
    (_BF16, _sizes(*hwck))
    for hwck in ((8, 8, 64, 64), (8, 8, 128, 128), (4, 4, 128, 128), (2, 2, 64, 128), (7, 9, 64, 64), (8, 8, 24, 80))
)
FORM = tuple((_BF16, sizes) for sizes in _BOXES[:2])
"""For what differs from the main form of a kernel in its loads or its epilogue."""


def _named(options):
    return {name: options.get(name, 1) for name in ("stride", "dilation", "groups")}


def _as_conv2d(options):
    options = _named(options)
    return {"stride": options["stride"], "padding": options["dilation"]} | options


def _make(options):
    def make(f: Maker, n, h, w, c, k):
        y = f.activation(n, h, w, c, mean=0.5)
        weight = f.weight(k, c // options.get("groups", 1), 3, 3)
        dy = f.activation(*nhwc(F.conv2d(nchw(y), weight, None, **_as_conv2d(options))).shape)
        return {"y": y, "bn": f.bn(y), "weight": weight, "dy": dy, "residual": f.activation(n, h, w, c)}

    return make


def _run(options):
    options = _named(options)

    def run(k, t):
        out, stats = k.conv3x3(t["y"], t["weight"], **options)
        masked, sums = k.conv3x3_dgrad(t["dy"], t["weight"], t["y"].shape[1:3], **options, y=t["y"], bn=t["bn"])
        return {
            "y": out,
            **merged(stats),
            "dx": masked,
            **affine_grads(k, sums, t["bn"]),
            "dW": k.conv3x3_wgrad(t["y"], t["dy"], **options, bn=t["bn"]),
        }

    return run


def _stock(options):
    options = _as_conv2d(options)

    def stock(t):
        y, weight, dy = nchw(t["y"]), t["weight"], nchw(t["dy"])
        out = nhwc(F.conv2d(y, weight, None, **options))
        z = batch_norm(t["y"], t["bn"])
        masked = relu_backward(nhwc(conv_grad.conv2d_input(y.shape, weight, dy, **options)), z)
        _, dgamma, dbeta = batch_norm_backward(masked, t["y"], t["bn"])
        return {
            "y": out,
            **statistics(out),
            "dx": masked,
            "dgamma": dgamma,
            "dbeta": dbeta,
            "dW": conv_grad.conv2d_weight(nchw(z.relu()), weight.shape, dy, **options),
        }

    return stock


def _run_plain(options):
    options = _named(options)

    def run(k, t):
        def dgrad(**more):
            return k.conv3x3_dgrad(t["dy"], t["weight"], t["y"].shape[1:3], **options, **more)[0]

        return {
            "y": k.conv3x3(t["y"], t["weight"], **options, with_stats=False)[0],
            "dx": dgrad(),
            "dx, masked": dgrad(mask=t["y"]),
            "dx + residual": dgrad(residual=t["residual"]),
            "dx + residual, masked": dgrad(residual=t["residual"], mask=t["y"]),
            "dW": k.conv3x3_wgrad(t["y"], t["dy"], **options),
        }

    return run


def _stock_plain(options):
    options = _as_conv2d(options)

    def stock(t):
        y, weight, dy = nchw(t["y"]), t["weight"], nchw(t["dy"])
        dx = nhwc(conv_grad.conv2d_input(y.shape, weight, dy, **options))
        return {
            "y": nhwc(F.conv2d(y, weight, None, **options)),
            "dx": dx,
            "dx, masked": relu_backward(dx, t["y"]),
            "dx + residual": dx + t["residual"],
            "dx + residual, masked": relu_backward(dx + t["residual"], t["y"]),
            "dW": conv_grad.conv2d_weight(y, weight.shape, dy, **options),
        }

    return stock


def _case(form, options, run, stock, static):
    name = f"conv3x3{form}{''.join(f', {name} {value}' for name, value in options.items())}"
    kernels = "conv3x3", "conv3x3_dgrad", "conv3x3_wgrad"
    tiles = 1 if static is FORM else 2
    return Case(name, kernels, _make(options), run(options), stock(options), SIZES, static, tiles, small={})


CASES = [
    # With statistics; in front of a BN + ReLU that dgrad masks by and sums up for; and behind it, which wgrad forms.
    *(
        _case("", options, _run, _stock, static)
        for options, static in (({}, STATIC), ({"stride": 2}, STRIDED), ({"dilation": 2}, ()), ({"groups": 4}, ()))
    ),
    *(
        _case(", plain", options, _run_plain, _stock_plain, static)
        for options, static in (({}, FORM), ({"stride": 2}, ()), ({"groups": 4}, ()))
    ),
]
