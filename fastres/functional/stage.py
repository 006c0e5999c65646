"""A stage: residual blocks one behind the other, as one differentiable function.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), table 1. The blocks' operators run one by one,
as they do for blocks by themselves. What a stage saves stands between the blocks, in backward (`_residual.py`,
`ResidualFunction`); docs/arithmetic.md counts it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._checks import check_input, prepare_input
from ._residual import chain, configure
from .basic_block import BasicBlockParams
from .bottleneck import BottleneckParams


def stage(x: Tensor, blocks: Sequence[BottleneckParams | BasicBlockParams], *, backend: str = "auto") -> Tensor:
    """The blocks one behind the other, each on the output of the one in front, fused.

    Args:
        x: `[N, C, H, W]`; channels_last memory is taken as it is, other memory is converted once.
        blocks: at least one.
        backend: one of `fastres.backends.CHOICES`.

    Returns:
        The last block's output, as `fastres.functional.bottleneck` and `basic_block` give it.

    Raises:
        As they do; where a shape or a dtype does not fit, naming the block. ValueError without blocks.
    """
    if not blocks:
        raise ValueError("stage: blocks is empty; pass at least one block")
    configs, tensors, shape = [], [], ()
    for index, params in enumerate(blocks):
        block = params.block()
        unit = f"stage, block {index} ({block.kind})"
        if index == 0:
            x = prepare_input(unit, x, block.weights[0])
            shape = x.shape
        else:
            check_input(unit, shape, x.dtype, x.device, block.weights[0])
        config, of_block, shape = configure(unit, block, shape, backend)
        configs.append(config)
        tensors.append(of_block)
    return chain(configs, x, tensors)
