"""The kernels in Triton, for CUDA devices of compute capability 8.0 and newer; see `fastres.kernels`.

Importing this module imports triton. The environment variable TRITON_INTERPRET=1, set before, makes the kernels run in
Triton's interpreter on CPU tensors (float32 and float16 only: the interpreter computes bfloat16 wrongly).
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
from .conv3x3 import conv3x3, conv3x3_dgrad, conv3x3_wgrad
from .expand import expand, expand_dgrad, expand_wgrad
from .gram import gram, gram_bwd, gram_finalize
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
    "conv3x3",
    "conv3x3_dgrad",
    "conv3x3_wgrad",
    "expand",
    "expand_dgrad",
    "expand_wgrad",
    "gram",
    "gram_bwd",
    "gram_finalize",
    "stem_pool",
    "stem_pool_bwd",
]
