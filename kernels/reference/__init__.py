"""Every kernel in plain PyTorch: the definition of what it computes, for any floating dtype on any device.

Values are computed in the accumulation dtype and rounded where a fused kernel would store them.
"""

from .batch_norm import (
    add_masked,
    bn_act,
    bn_bwd_apply,
    bn_bwd_finalize,
    bn_bwd_mask,
    bn_bwd_reduce,
    bn_constants,
    bn_finalize,
    channel_stats,
)
from .conv1x1 import conv1x1, conv1x1_bwd, conv1x1_dgrad, conv1x1_wgrad
from .conv2d import conv2d, conv2d_dgrad, conv2d_wgrad
from .conv3x3 import conv3x3, conv3x3_dgrad, conv3x3_wgrad
from .expand import expand, expand_dgrad, expand_wgrad
from .gram import gram, gram_bwd, gram_finalize
from .projection import projection_conv, projection_dgrad, projection_fprop, projection_gram, projection_wgrad
from .stem import stem_pool, stem_pool_bwd

__all__ = [
    "add_masked",
    "bn_act",
    "bn_bwd_apply",
    "bn_bwd_finalize",
    "bn_bwd_mask",
    "bn_bwd_reduce",
    "bn_constants",
    "bn_finalize",
    "channel_stats",
    "conv1x1",
    "conv1x1_bwd",
    "conv1x1_dgrad",
    "conv1x1_wgrad",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv3x3",
    "conv3x3_dgrad",
    "conv3x3_wgrad",
    "expand",
    "expand_dgrad",
    "expand_wgrad",
    "gram",
    "gram_bwd",
    "gram_finalize",
    "projection_conv",
    "projection_dgrad",
    "projection_fprop",
    "projection_gram",
    "projection_wgrad",
    "stem_pool",
    "stem_pool_bwd",
]
