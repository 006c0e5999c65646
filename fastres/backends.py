"""Which kernel namespaces can run on this machine, and why not.

Nothing here asks for a GPU, imports triton or loads the extension before it is called.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

NAMESPACES = ("reference", "library", "triton", "projection", "projection.hopper")
"""The modules of `fastres.kernels`, each with the kernels that it offers."""

CHOICES = ("auto", "reference", "library", "triton")
"""What a `backend` argument, a module's `backend` attribute and FASTRES_BACKEND may name."""


def available() -> dict[str, str | None]:
    """Each namespace, with None where it can run on this machine or else the reason why it cannot."""
    return {namespace: reason(namespace) for namespace in NAMESPACES}


def reason(namespace: str) -> str | None:
    """Why a namespace cannot run on this machine, None where it can."""
    if namespace == "triton":
        return _triton_reason()
    return load(namespace).available() if namespace.startswith("projection") else None


def offers(namespace: str, kernel: str, dtype: torch.dtype, device_type: str) -> bool:
    """Whether a namespace that can run here has the kernel for activations of this dtype on this type of device."""
    if not hasattr(load(namespace), kernel):
        return False
    if namespace == "triton":
        return device_type == "cuda" and dtype != torch.float64
    if namespace == "projection" and device_type == "cpu":
        return dtype != torch.float16 and kernel != "projection_conv"
    if namespace.startswith("projection"):
        return (
            device_type == "cuda"
            and dtype in (torch.bfloat16, torch.float16)
            and load("projection").cuda_available() is None
        )
    return True


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is one of `CHOICES`."""
    if backend not in CHOICES:
        raise ValueError(f"backend={backend!r} is not known; use one of {', '.join(map(repr, CHOICES))}")


def require(backend: str) -> None:
    """Raise ValueError for an unknown `backend`, RuntimeError with the reason for one that cannot run here."""
    check_name(backend)
    why = None if backend == "auto" else reason(backend)
    if why is not None:
        raise RuntimeError(f"backend={backend!r} cannot run on this machine: {why}")


@functools.cache
def load(namespace: str) -> ModuleType:
    """The module `fastres.kernels.<namespace>`."""
    return importlib.import_module(f"fastres.kernels.{namespace}")


@functools.cache
def _triton_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        common = importlib.import_module("fastres.kernels.triton._common")
    except ImportError as error:
        return f"triton does not import ({error})"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if common.configured_part(10 * major + minor) is None:
            return f"cuda:{index} has compute capability {major}.{minor}, the Triton kernels need 8.0"
    return None
