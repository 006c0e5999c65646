"""Cases of Gram folding: second moments, and the small matrices of both directions."""

from __future__ import annotations

import functools

import torch

from fastres.kernels import reference
from fastres.kernels.reference.gram import Gram, gram_of_rows

from ._common import Case, Maker, batch_norm, rows

SIZES = {"n": 4, "h": 9, "w": 8, "k": 40, "c": 56}
EPS = 1e-5
_BF16, _F32 = torch.bfloat16, torch.float32
MOMENTS = tuple(
    (dtype, {"n": 256, "h": h, "w": h, "k": k, "c": 24})
    for dtype, h, k in ((_BF16, 56, 64), (_BF16, 28, 128), (_BF16, 14, 256), (_BF16, 28, 100), (_F32, 28, 128))
)
"""Every tile there is, a channel count that TMA does not take, and float32."""
SMALL = tuple((dtype, {"n": 256, "h": 28, "w": 28, "k": 48, "c": 64}) for dtype in (_BF16, torch.float16, _F32))


def _make_moments(f: Maker, n, h, w, k, c):
    y = f.activation(n, h, w, k, mean=0.5)
    return {"y": y, "bn": f.bn(y)}


def _about_the_mean(moments, count: int):
    """The mean and the centred scatter: moments about different pivots cannot be compared."""
    total = moments.total.double()
    scatter = moments.gram.double() - torch.outer(total, total) / count
    return {"mean": (moments.pivot.double() + total / count), "scatter": scatter}


def _run_moments(k, t):
    return _about_the_mean(k.gram(t["y"], t["bn"]), t["y"].shape[:3].numel())


def _stock_moments(t):
    a = rows(batch_norm(t["y"], t["bn"]).relu()).float()
    mean = a.mean(0)
    return {"mean": mean.double(), "scatter": ((a - mean).T @ (a - mean)).double()}


def _make_small(f: Maker, n, h, w, k, c):
    """From float64 moments and sums, rounded once: what is tried is the small matrices alone."""
    a = f.activation(n, h, w, k, mean=0.3)
    g = f.activation(n, h, w, c, mean=0.1)
    if f.device.type == "meta":
        moments = [f.vector(k).new_empty(size) for size in ((k, k), (k,), (k,))]
        p, sum_g = f.vector(c).new_empty(c, k), f.vector(c)
    else:
        wide = rows(a.double().relu())
        moments = [t.to(f.acc) for t in gram_of_rows(wide)]
        p, sum_g = (t.to(f.acc) for t in (rows(g).double().T @ wide, rows(g).double().sum(0)))
    names = dict(zip(("gram", "total", "pivot"), moments, strict=True))
    return names | {
        "p": p,
        "sum_g": sum_g,
        "conv_weight": f.weight(c, k),
        "weight": f.vector(c),
        "bias": f.vector(c, -0.5, 0.5),
        "running_mean": f.vector(c, -1, 1),
        "running_var": f.vector(c),
        "num_batches_tracked": torch.tensor(3, device=f.device),
        "count": n * h * w,
    }


def _run_small(momentum):
    def run(k, t):
        moments = Gram(t["gram"], t["total"], t["pivot"])
        state = [t[name] for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
        bn, mean, scatter = k.gram_finalize(moments, t["count"], t["conv_weight"], *state, momentum, EPS)
        small = t["p"], t["sum_g"], t["conv_weight"], bn, t["count"], mean, scatter
        dw, grad, u, v, offset, v_scale, d = k.gram_bwd(*small)
        return {
            **dict(zip(("bn mean", "rstd", "scale", "shift"), bn, strict=True)),
            "running_mean": t["running_mean"],
            "running_var": t["running_var"],
            "num_batches_tracked": t["num_batches_tracked"].to(bn.dtype),
            "mean": mean,
            "scatter": scatter,
            "dW": dw,
            "dgamma": grad[0],
            "dbeta": grad[1],
            "u": u,
            "v": v.to(bn.dtype) * (1 if v_scale is None else v_scale),
            # d is what rounding has lost, which differs from one way of rounding to another.
            "k without d's part": offset if d is None else offset + d * mean,
        }

    return run


CASES = [
    Case("gram", ("gram",), _make_moments, _run_moments, _stock_moments, SIZES, MOMENTS, tiles=2),
    *(
        Case(
            f"gram, small matrices{'' if momentum else ', cumulative average'}",
            ("gram_finalize", "gram_bwd"),
            _make_small,
            _run_small(momentum),
            functools.partial(_run_small(momentum), reference),  # the operators that the kernels replace
            SIZES,
            SMALL if momentum else (),
        )
        for momentum in (0.1, None)
    ),
]
