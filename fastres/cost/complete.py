"""The plan when every kernel that is planned exists: modelled, because not all of it does.

Every kernel keeps its contract in one pass. Besides, what no unit's operator does yet:

- A stage runs its blocks as a chain: a block's input gradient leaves it masked by the ReLU before, so the block in
  front neither reads its output for the mask nor writes the masked gradient.
- Up to 128 channels, the backward of a bottleneck's first 1x1 conv forms dgrad and wgrad in one pass over its operands.

docs/arithmetic.md, "Bytes", has the same in tables.
"""

from __future__ import annotations

from typing import NamedTuple

from fastres.kernels.reference.conv1x1 import ONE_PASS_CHANNELS

from . import kernels
from .counting import contract_bytes
from .traffic import tensors, touched


class Place(NamedTuple):
    """Where a block stands in its stage. first: nothing of the stage is in front of it. last: nothing behind it."""

    first: bool
    last: bool


def complete_bytes(place: Place, kernel: str, arguments: kernels.Arguments, result: object) -> int:
    """What `kernel` moves as a step of a block at `place`."""
    reads = kernels.reads(kernel, arguments)
    saved = 0
    if not place.last and "out" in reads:
        # The gradient is masked already.
        saved += reads["out"]
        if kernel == "expand_wgrad":
            saved += touched(result[2])
        elif kernel == "bn_bwd_apply" and arguments["need_residual"] and arguments["residual_bn"] is None:
            saved += touched(result[1])
    one_pass = kernel in ("conv1x1_dgrad", "conv1x1_wgrad") and _narrow(arguments)
    if kernel == "conv1x1_wgrad" and one_pass:
        saved += reads["g"] + reads.get("y", 0)
    makes_input_grad = kernel == "conv1x1_dgrad" or (kernel == "conv3x3_dgrad" and arguments["bn"] is None)
    if makes_input_grad and not place.first and not one_pass:
        # For the mask, which needs the block's input; the one pass has it at hand.
        saved -= touched(tensors(result)[0])
    return contract_bytes(kernel, arguments, result) - saved


def _narrow(arguments: kernels.Arguments) -> bool:
    return arguments["g"].shape[-1] <= ONE_PASS_CHANNELS and arguments["stride"] == 1
