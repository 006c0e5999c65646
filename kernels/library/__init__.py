"""The contracts of `fastres.kernels.reference` through PyTorch's own operators.

A convolution or GEMM of the library (cuDNN, oneDNN, BLAS) in the activation dtype, and the element-wise and reduction
passes that complete the contract. Small per-channel and matrix work is the reference's.
"""

from .batch_norm import add_masked, bn_act, bn_bwd_apply, bn_bwd_mask, bn_bwd_reduce, channel_stats
from .conv1x1 import conv1x1, conv1x1_bwd, conv1x1_dgrad, conv1x1_wgrad
from .conv2d import conv2d, conv2d_dgrad, conv2d_wgrad
from .conv3x3 import conv3x3, conv3x3_dgrad, conv3x3_wgrad
from .expand import expand, expand_dgrad, expand_wgrad
from .gram import gram
from .projection import projection_conv, projection_dgrad, projection_fprop, projection_gram, projection_wgrad
from .stem import stem_pool

__all__ = [
    "add_masked",
    "bn_act",
    "bn_bwd_apply",
    "bn_bwd_mask",
    "bn_bwd_reduce",
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
    "projection_conv",
    "projection_dgrad",
    "projection_fprop",
    "projection_gram",
    "projection_wgrad",
    "stem_pool",
]
