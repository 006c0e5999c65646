"""Cases of the batch norm family."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._common import (
    Case,
    Maker,
    affine_grads,
    backward_vectors,
    batch_norm,
    batch_norm_backward,
    merged,
    nchw,
    nhwc,
    relu_backward,
)

SIZES = {"n": 4, "h": 9, "w": 7, "c": 24}
STATIC = ((torch.bfloat16, {"n": 256, "h": 56, "w": 56, "c": 64}),)
"""What every form is compiled for. Wider tensors run more programs of the same code."""

STATIC_EVERY_CONFIG = tuple(
    (dtype, sizes)
    for dtype in (torch.bfloat16, torch.float32)
    for sizes in (STATIC[0][1], *({"n": 256, "h": 32, "w": 32, "c": c} for c in (16, 24, 32)))
)
"""What each kernel's heaviest form is compiled for: every tile there is, and channels that 16 does not divide."""


def _statistics(f: Maker, n, h, w, c, mean=3.0):
    return {
        "y": f.activation(n, h, w, c, mean=mean),
        "weight": f.vector(c),
        "bias": f.vector(c, -0.5, 0.5),
        "running_mean": f.vector(c, -1, 1),
        "running_var": f.vector(c),
        "num_batches_tracked": torch.tensor(2, device=f.device),
    }


def _run_statistics(momentum):
    def run(k, t):
        stats = k.channel_stats(t["y"])
        running = t["running_mean"], t["running_var"], t["num_batches_tracked"]
        bn = k.bn_finalize(stats, t["weight"], t["bias"], *running, momentum, 1e-5)
        return merged(stats) | {
            "rstd": bn[1],
            "scale": bn[2],
            "shift": bn[3],
            **{name: t[name] for name in ("running_mean", "running_var", "num_batches_tracked")},
        }

    return run


def _stock_statistics(momentum):
    def stock(t):
        tracked = t["num_batches_tracked"] + 1
        factor = 1 / tracked.item() if momentum is None else momentum
        _, mean, rstd = torch.native_batch_norm(
            nchw(t["y"]), t["weight"], t["bias"], t["running_mean"], t["running_var"], True, factor, 1e-5
        )
        scale = t["weight"] * rstd
        return {
            "mean": mean,
            "var": rstd**-2 - 1e-5,
            "rstd": rstd,
            "scale": scale,
            "shift": t["bias"] - mean * scale,
            "running_mean": t["running_mean"],
            "running_var": t["running_var"],
            "num_batches_tracked": tracked,
        }

    return stock


def _constants(f: Maker, n, h, w, c):
    return {
        "running_mean": f.vector(c, -1, 1),
        "running_var": f.vector(c),
        "weight": f.vector(c),
        "bias": f.vector(c, -0.5, 0.5),
        "y": f.activation(n, h, w, c),
    }


def _run_constants(k, t):
    bn = k.bn_constants(t["running_mean"], t["running_var"], t["weight"], t["bias"], 1e-5, t["y"].dtype)
    return {"out": k.bn_act(t["y"], bn, relu=False)}


def _stock_constants(t):
    running = t["running_mean"], t["running_var"]
    return {"out": nhwc(F.batch_norm(nchw(t["y"]), *running, t["weight"], t["bias"], eps=1e-5))}


def _act(shortcut, relu):
    def make(f: Maker, n, h, w, c, mean=0.0):
        y = f.activation(n, h, w, c, mean=mean)
        t = {"y": y, "bn": f.bn(y), "relu": relu}
        if shortcut != "none":
            t["residual"] = f.activation(n, h, w, c)
        if shortcut == "projected":
            t["residual_bn"] = f.bn(t["residual"])
        return t

    return make


def _run_act(k, t):
    return {"out": k.bn_act(**t)}


def _stock_act(t):
    z = batch_norm(t["y"], t["bn"])
    if "residual_bn" in t:
        z = z + batch_norm(t["residual"], t["residual_bn"])
    elif "residual" in t:
        z = z + t["residual"]
    return {"out": z.relu() if t["relu"] else z}


def _reduce(mask, two=False):
    def make(f: Maker, n, h, w, c, mean=0.0):
        y = f.activation(n, h, w, c, mean=mean)
        t = {"g": f.activation(n, h, w, c, mean=0.1), "y": y, "bn": f.bn(y), "relu": mask == "input"}
        if mask == "output":
            t["out"] = f.activation(n, h, w, c).relu()
        if two:
            t["residual"] = f.activation(n, h, w, c, mean=-1.0)
            t["residual_bn"] = f.bn(t["residual"])
        return t

    return make


def masked(t):
    """g' of a stock ReLU; the sign of its input is its output's."""
    if "out" in t:
        return relu_backward(t["g"], t["out"])
    return relu_backward(t["g"], batch_norm(t["y"], t["bn"])) if t["relu"] else t["g"]


def _run_reduce(k, t):
    sums, residual_sums = k.bn_bwd_reduce(**t)
    results = affine_grads(k, sums, t["bn"])
    if residual_sums is not None:
        second = affine_grads(k, residual_sums, t["residual_bn"])
        results |= {f"residual {name}": value for name, value in second.items()}
    return results


def _stock_reduce(t):
    g = masked(t)
    _, dgamma, dbeta = batch_norm_backward(g, t["y"], t["bn"])
    results = {"dgamma": dgamma, "dbeta": dbeta}
    if "residual" in t:
        _, dgamma, dbeta = batch_norm_backward(g, t["residual"], t["residual_bn"])
        results |= {"residual dgamma": dgamma, "residual dbeta": dbeta}
    return results


def _add(f: Maker, n, h, w, c):
    return {name: f.activation(n, h, w, c) for name in ("g", "residual", "out")}


def _run_add(k, t):
    return {"g": k.add_masked(**t)}


def _stock_add(t):
    return {"g": relu_backward(t["g"] + t["residual"], t["out"])}


def _run_mask(k, t):
    g, sums = k.bn_bwd_mask(t["g"], t["y"], t["bn"])
    return {"g": g, **affine_grads(k, sums, t["bn"])}


def _stock_mask(t):
    return {"g": masked(t), **_stock_reduce(t)}


def _apply(mask, shortcut="none", constant=False, frozen=False):
    def make(f: Maker, n, h, w, c, mean=0.0):
        t = _reduce(mask, two=shortcut == "projected")(f, n, h, w, c, mean)
        y, residual = t["y"], t.get("residual")
        if constant:
            t["bn"] = f.constants(y)
            t["y"] = y if mask == "input" else None
            t["grad"] = None if frozen else torch.zeros_like(t["bn"])
            t.pop("residual", None)
        else:
            t["grad"] = backward_vectors(masked(t), y, t["bn"])
        t["need_residual"] = shortcut != "none"
        if residual is not None:
            grad = t["grad"] if constant else backward_vectors(masked(t), residual, t["residual_bn"])
            t["residual_grad"] = grad
        return t

    return make


def _run_apply(k, t):
    dy, dresidual = k.bn_bwd_apply(**t)
    return {"dy": dy} if dresidual is None else {"dy": dy, "dresidual": dresidual}


def _stock_apply(constant):
    def stock(t):
        g = masked(t)
        # The gradient with constant statistics does not depend on y.
        y, residual = (g if constant else t.get(name) for name in ("y", "residual"))
        results = {"dy": batch_norm_backward(g, y, t["bn"], constant)[0]}
        if t["need_residual"] and "residual_bn" in t:
            results["dresidual"] = batch_norm_backward(g, residual, t["residual_bn"], constant)[0]
        elif t["need_residual"]:
            results["dresidual"] = g
        return results

    return stock


def _run_backward(k, t):
    g, y, bn, out = t["g"], t["y"], t["bn"], t["out"]
    grad = k.bn_bwd_finalize(k.bn_bwd_reduce(g, y, bn, out=out)[0], bn, y.shape[:3].numel())
    dy, _ = k.bn_bwd_apply(g, y, bn, grad, out=out)
    return {"dy": dy, "dgamma": grad[0], "dbeta": grad[1]}


def _stock_backward(t):
    dy, dgamma, dbeta = batch_norm_backward(masked(t), t["y"], t["bn"])
    return {"dy": dy, "dgamma": dgamma, "dbeta": dbeta}


_HEAVIEST = (
    "statistics, momentum 0.1",
    "bn_act, shortcut projected, ReLU",
    "bn_bwd_reduce, mask output, two branches",
    "bn_bwd_apply, mask output, shortcut projected",
)


def _case(name, kernels, make, run, stock, static=STATIC):
    static = STATIC_EVERY_CONFIG if name in _HEAVIEST else static
    return Case(name, tuple(kernels.split()), make, run, stock, SIZES, static)


CASES = [
    *(
        _case(
            f"statistics, momentum {momentum}",
            "channel_stats bn_finalize",
            _statistics,
            _run_statistics(momentum),
            _stock_statistics(momentum),
        )
        for momentum in (0.1, None)
    ),
    _case("bn_constants", "bn_constants bn_act", _constants, _run_constants, _stock_constants),
    *(
        _case(
            f"bn_act, shortcut {shortcut}{', ReLU' if relu else ''}",
            "bn_act",
            _act(shortcut, relu),
            _run_act,
            _stock_act,
        )
        for shortcut in ("none", "identity", "projected")
        for relu in (True, False)
    ),
    *(
        _case(
            f"bn_bwd_reduce, mask {mask}{', two branches' if two else ''}",
            "bn_bwd_reduce bn_bwd_finalize",
            _reduce(mask, two),
            _run_reduce,
            _stock_reduce,
        )
        for mask, two in (("none", False), ("output", False), ("input", False), ("none", True), ("output", True))
    ),
    _case("bn_bwd_mask", "bn_bwd_mask bn_bwd_finalize", _reduce("input"), _run_mask, _stock_mask),
    _case("add_masked", "add_masked", _add, _run_add, _stock_add),
    _case(
        "batch norm backward",
        "bn_bwd_reduce bn_bwd_finalize bn_bwd_apply",
        _reduce("output"),
        _run_backward,
        _stock_backward,
    ),
    *(
        _case(
            f"bn_bwd_apply, mask {mask}, shortcut {shortcut}{', constant' if constant else ''}",
            "bn_bwd_apply",
            _apply(mask, shortcut, constant),
            _run_apply,
            _stock_apply(constant),
        )
        for constant in (False, True)
        for mask, shortcut in (
            ("none", "none"),
            ("none", "identity"),
            ("output", "none"),
            ("output", "identity"),
            ("output", "projected"),
            ("input", "none"),
        )
    ),
    *(
        _case(
            f"bn_bwd_apply, mask {mask}, shortcut {shortcut}, frozen",
            "bn_bwd_apply",
            _apply(mask, shortcut, constant=True, frozen=True),
            _run_apply,
            _stock_apply(constant=True),
        )
        for mask, shortcut in (("none", "none"), ("output", "projected"), ("input", "none"))
    ),
]
