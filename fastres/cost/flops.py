"""FLOP formulas of the fused operators, for `torch.utils.flop_counter.FlopCounterMode`.

They are registered when `fastres.cost` is imported, not with the operators: the counter's own module imports triton.
A model's modules run their children one by one inside that mode, because it hooks every module's call; the formulas
serve whoever calls `fastres.functional`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import register_flop_formula

from fastres import plan
from fastres.functional import _library
from fastres.parts import PARTS

from .counting import contract_bytes, counting
from .traffic import Traffic


def register() -> None:
    """A formula for every operator of `torch.ops.fastres`: the sum over the kernels that its body calls."""
    for operator, body in _library.BODIES.items():
        register_flop_formula(operator.overloadpacket, get_raw=True)(_formula(body))


def _formula(body: Callable) -> Callable[..., int]:
    def flops(*args, out_val=None) -> int:
        on_meta = tree_map_only(Tensor, _on_meta, args)
        first = next(t for t in args if isinstance(t, Tensor))

        def wrap(k):
            return counting(k, traffic, contract_bytes)

        with Traffic(PARTS["h200"]) as traffic, plan.wrapping(wrap), plan.planning_for(first.device):
            body(*on_meta)
        return sum(step.flops for step in traffic.steps)

    return flops


def _on_meta(t: Tensor) -> Tensor:
    """The shape; float64 as float32, which has the same products, because no part has a floor for float64."""
    return t.to("meta", torch.float32 if t.dtype == torch.float64 else t.dtype)
