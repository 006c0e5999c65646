"""Which launcher runs each kernel of a fused unit: the one place where that is decided.

A plan is a namespace `k` with one launcher per kernel name; the bodies in `fastres.functional` read `k.conv1x1(...)`
and know nothing of backends. `k.gram_folding` says which of their two forms they run (`fastres.functional._residual`).
On a GPU blocks are Gram-folded where the kernels that make `expand` one pass exist: by library operators the folded
form takes many small launches for its matrices. On a CPU launches cost little and blocks are folded for the memory,
although the stored form can be the faster one there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from . import backends

ENVIRONMENT_VARIABLE = "FASTRES_BACKEND"

_FOLDED_PROJECTION = ("projection_gram", "projection_fprop", "projection_wgrad", "projection_dgrad")

# Where the extension's CPU kernels beat the library's on most of ResNet-50's shapes on an AMD EPYC with AVX-512
# (benchmarks/kernels/test_projection.py): all four in float32, though not on layer1's wgrad and layer4's fprop; in
# bfloat16, where oneDNN multiplies natively, only the Gram.
_EXTENSION_ON_CPU = {torch.float32: _FOLDED_PROJECTION, torch.bfloat16: ("projection_gram",)}

_wrap: Callable[[SimpleNamespace], SimpleNamespace] | None = None


def requested(backend: str) -> str:
    """The backend to use: FASTRES_BACKEND where it is set, else `backend`. ValueError when it names none."""
    name = os.environ.get(ENVIRONMENT_VARIABLE) or backend
    backends.check_name(name)
    return name


def resolve(dtype: torch.dtype, device: torch.device, backend: str = "auto") -> SimpleNamespace:
    """The launchers for activations of this dtype and device; on the meta device those of a GPU, for counting.

    Raises RuntimeError when an explicitly requested backend cannot run there; "auto" takes the next best.
    `origins(...)` tells which namespace each launcher is from.
    """
    k = _resolve(dtype, device.type, requested(backend))
    return k if _wrap is None else _wrap(k)


def resolve_projection(x: Tensor, output_shape: tuple[int, ...], backend: str = "auto") -> SimpleNamespace:
    """As `resolve`, for a projection shortcut outside of a block: x `[N, H, W, C]`, its output `[N, Ho, Wo, K]`."""
    name = requested(backend)
    *pixels, outputs = output_shape
    strided = tuple(pixels[1:]) != tuple(x.shape[1:3])
    extension = (
        name == "auto"
        and _extension_on_gpu(x.dtype, x.device.type)
        and seconds_saved_by_folding(math.prod(pixels), x.shape[3], outputs, strided) > 0
    )
    k = _resolve_projection(x.dtype, x.device.type) if extension else _resolve(x.dtype, x.device.type, name)
    return k if _wrap is None else _wrap(k)


def seconds_saved_by_folding(pixels: int, channels: int, outputs: int, strided: bool) -> float:
    """Of a training step of a projection shortcut on a GPU, by the extension's Gram-folded form instead of the stored
    form by the library's convolution; negative where folding costs time.

    A model, not a measurement, whose terms and rates docs/arithmetic.md derives ("The projection shortcut on a GPU").
    pixels: of the output. strided: the library gathers the pixels that it reads.
    """
    memory, mma_sync, library = 4.3e12, 350e12, 600e12  # bytes/s, FLOP/s, FLOP/s
    small_matrices = 2e-4
    bytes_saved = 2 * (8 * outputs + (3 if strided else -3) * channels)
    more_flops, common_flops = 3 * channels**2, 6 * channels * outputs
    slower = more_flops / mma_sync + common_flops * (1 / mma_sync - 1 / library)
    return pixels * (bytes_saved / memory - slower) - small_matrices


@contextlib.contextmanager
def wrapping(wrap: Callable[[SimpleNamespace], SimpleNamespace]) -> Iterator[None]:
    """Inside, `resolve` gives `wrap(k)` in place of k: how a unit's kernel calls are counted."""
    global _wrap
    before, _wrap = _wrap, wrap
    try:
        yield
    finally:
        _wrap = before


@functools.cache
def _resolve(dtype: torch.dtype, device_type: str, backend: str) -> SimpleNamespace:
    modules = [backends.load(namespace) for namespace in _preference(dtype, device_type, backend)]
    names = backends.load("reference").__all__
    chosen = {name: next(getattr(module, name) for module in modules if hasattr(module, name)) for name in names}
    if backend == "auto" and device_type == "cpu" and backends.reason("projection") is None:
        extension = backends.load("projection")
        chosen |= {name: getattr(extension, name) for name in _EXTENSION_ON_CPU.get(dtype, ())}
    return SimpleNamespace(**chosen, gram_folding=device_type == "cpu" or origin(chosen["expand"]) != "library")


@functools.cache
def _resolve_projection(dtype: torch.dtype, device_type: str) -> SimpleNamespace:
    extension = backends.load("projection")
    chosen = {name: getattr(extension, name) for name in _FOLDED_PROJECTION}
    return SimpleNamespace(**vars(_resolve(dtype, device_type, "auto")) | chosen | {"gram_folding": True})


def _extension_on_gpu(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the extension's CUDA kernels run there; on the meta device, which stands for a GPU, if it is built."""
    if backends.reason("projection") is not None:
        return False
    if device_type == "meta":
        return dtype in (torch.bfloat16, torch.float16)
    return device_type == "cuda" and backends.offers("projection", "projection_gram", dtype, "cuda")


def _preference(dtype: torch.dtype, device_type: str, backend: str) -> tuple[str, ...]:
    """Namespaces in the order in which a kernel is looked for."""
    if backend == "triton":
        if device_type != "meta":
            backends.require("triton")
        if device_type == "cpu":
            raise RuntimeError(f"backend='triton' needs CUDA tensors, got {device_type}; move the model or use 'auto'")
        if dtype == torch.float64:
            raise RuntimeError("backend='triton' has no float64 kernels; use backend='auto' or 'reference'")
    # float64 is where numbers are proved: always the definition itself.
    if backend == "reference" or dtype == torch.float64:
        return ("reference",)
    if backend == "triton" or (backend == "auto" and _has_triton(device_type)):
        return ("triton", "library", "reference")
    return ("library", "reference")


def _has_triton(device_type: str) -> bool:
    if device_type == "meta":
        return importlib.util.find_spec("triton") is not None
    return device_type == "cuda" and backends.reason("triton") is None


def origins(dtype: torch.dtype, device: torch.device, backend: str = "auto") -> dict[str, str]:
    """Kernel name -> the namespace whose launcher `resolve` chose."""
    return {name: origin(launcher) for name, launcher in launchers(resolve(dtype, device, backend)).items()}


def in_form(k: SimpleNamespace, gram_folding: bool) -> SimpleNamespace:
    """The same launchers, with blocks Gram-folded or stored whatever the plan says."""
    return SimpleNamespace(**vars(k) | {"gram_folding": gram_folding})


def launchers(k: SimpleNamespace) -> dict[str, Callable]:
    """The launchers of a plan by name."""
    return {name: value for name, value in vars(k).items() if callable(value)}


def origin(launcher: Callable) -> str:
    """The namespace of `fastres.kernels` that a launcher is from."""
    return launcher.__module__.split(".kernels.")[1].split(".")[0]
