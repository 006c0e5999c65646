"""The projection kernels by TMA and wgmma, for GPUs of compute capability 9.0. No plan chooses them yet.

What this path has no form for (a masked g, channels that are no multiples of 8, memory that is not aligned to 16 bytes)
its functions hand to the portable kernels.
"""

from __future__ import annotations

import functools

import torch

from . import cuda_available, projection_dgrad, projection_fprop, projection_gram, projection_wgrad

__all__ = ["available", "projection_dgrad", "projection_fprop", "projection_gram", "projection_wgrad"]


def available() -> str | None:
    """None where these kernels run on every GPU that torch sees, else the reason."""
    reason = cuda_available()
    if reason is not None:
        return reason
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) != (9, 0):
            return f"cuda:{index} has compute capability {major}.{minor}, TMA and wgmma are used as in 9.0"
    return None


def _by_hopper(launcher):
    return functools.update_wrapper(functools.partial(launcher, hopper=True), launcher)


projection_dgrad = _by_hopper(projection_dgrad)
projection_fprop = _by_hopper(projection_fprop)
projection_gram = _by_hopper(projection_gram)
projection_wgrad = _by_hopper(projection_wgrad)
