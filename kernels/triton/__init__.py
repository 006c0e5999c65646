"""The kernels in Triton, for CUDA devices of compute capability 8.0 and newer; see `fastres.kernels`.

Importing this module imports triton. The environment variable TRITON_INTERPRET=1, set before, makes the kernels run in
Triton's interpreter on CPU tensors (float32 and float16 only: the interpreter computes bfloat16 wrongly).
"""

from .batch_norm import (
    bn_act,
    bn_bwd_apply,
    bn_bwd_finalize,
    bn_bwd_reduce,
    bn_constants,
    bn_finalize,
    channel_stats,
)
from .stem import stem_pool, stem_pool_bwd

__all__ = [
    "bn_act",
    "bn_bwd_apply",
    "bn_bwd_finalize",
    "bn_bwd_reduce",
    "bn_constants",
    "bn_finalize",
    "channel_stats",
    "stem_pool",
    "stem_pool_bwd",
]
