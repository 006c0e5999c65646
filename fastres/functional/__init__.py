"""Fused units as differentiable functions, one file each, over one `torch.library` operator per direction.

A stage runs those of its blocks.
"""

from ._batch_norm import BatchNormParams
from .basic_block import BasicBlockParams, basic_block
from .bottleneck import BottleneckParams, bottleneck
from .conv_bn_relu import conv_bn_relu
from .projection import projection
from .stage import stage
from .stem import stem

__all__ = [
    "BasicBlockParams",
    "BatchNormParams",
    "BottleneckParams",
    "basic_block",
    "bottleneck",
    "conv_bn_relu",
    "projection",
    "stage",
    "stem",
]
