"""The plan if every kernel kept its contract in one pass and every projection were folded, fast or not: modelled.

Besides, up to 128 channels the backward of a bottleneck's first 1x1 conv forms dgrad and wgrad in one pass over its
operands. docs/arithmetic.md, "Bytes", has the same in tables.
"""

from __future__ import annotations

from fastres.kernels.reference.conv1x1 import ONE_PASS_CHANNELS

from . import kernels
from .counting import contract_bytes


def complete_bytes(kernel: str, arguments: kernels.Arguments, result: object) -> int:
    """What `kernel` moves."""
    saved = 0
    if kernel in ("conv1x1_dgrad", "conv1x1_wgrad") and _narrow(arguments):
        # What the other of the two reads as well; the conv's input, by which dx is masked, is the wgrad's x.
        reads = kernels.reads(kernel, arguments)
        again = ("mask",) if kernel == "conv1x1_dgrad" else ("g", "y")
        saved = sum(reads.get(name, 0) for name in again)
    return contract_bytes(kernel, arguments, result) - saved


def _narrow(arguments: kernels.Arguments) -> bool:
    return arguments["g"].shape[-1] <= ONE_PASS_CHANNELS and arguments["stride"] == 1
