"""FLOP formulas of the fused operators, for `torch.utils.flop_counter.FlopCounterMode`.

They are registered when `fastres.cost` is imported, not with the operators: the counter's own module imports triton.
A model's modules run their children one by one inside that mode, because it hooks every module's call; the formulas
serve whoever calls `fastres.functional`.
"""

from __future__ import annotations

from collections.abc import Callable

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
        on_meta = tree_map_only(Tensor, lambda t: t.to("meta"), args)
        with Traffic(PARTS["h200"]) as traffic, plan.wrapping(lambda k: counting(k, traffic, contract_bytes)):
            body(*on_meta)
        return sum(step.flops for step in traffic.steps)

    return flops
