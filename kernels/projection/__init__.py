"""The strided 1x1 projection shortcut in C++ and CUDA: its kernels read the strided pixels where they lie.

x is NHWC `[N, H, W, C]`; x_s = x[:, ::stride, ::stride] has Ho = (H - 1) // stride + 1 rows and Wo = (W - 1) // stride
+ 1 columns of pixels. Any stride >= 1 and any sizes, an empty batch included. "acc" is float64 for float64 and else
float32. Results have the same bits from run to run. Arguments that do not fit raise RuntimeError with the argument's
name.

On a CPU x is float32, float64 or bfloat16, all tensors are dense, and results do not depend on the number of threads.
On CUDA x is bfloat16 or float16, has fewer than 2**31 strided pixels, and of `[N, H, W, channels]` tensors only the
channels need be dense.

The library is built with the package (setup.py) and loaded on the first call; `available()` says whether it is there,
`cuda_available()` whether it has kernels for this machine's GPUs.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from ..reference._common import acc_dtype
from ..reference.batch_norm import ChannelStats
from ..reference.gram import Gram

__all__ = [
    "available",
    "cuda_available",
    "projection_conv",
    "projection_dgrad",
    "projection_fprop",
    "projection_gram",
    "projection_wgrad",
]

_FOLDER = Path(__file__).parent


@functools.cache
def available() -> str | None:
    """None when the library is there and loads, else the reason. The first call loads it and registers the fakes."""
    build = build_outcome()
    if not build:
        return "not built: the package was not installed by its setup.py (pip install --no-build-isolation -e .)"
    if not build["built"]:
        return f"not built: {build['reason']}"
    library = _FOLDER / build["library"]
    if not library.exists():
        return f"not built: {library} is missing, install the package again"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name}, built for torch {build['torch']}, does not load in torch {torch.__version__}: {error}"
    _register_fakes()
    return None


@functools.cache
def cuda_available() -> str | None:
    """None when the library has kernels that run on every GPU that torch sees, of which there is one, else the reason.

    A GPU runs machine code of its own generation, as new as itself or older, and PTX of any older one. The driver must
    be of nvcc's CUDA release or a newer one, whichever torch itself was built with.
    """
    reason = available()
    if reason is not None:
        return reason
    build = build_outcome()
    if build["cuda"] is not None:
        return f"built without its CUDA kernels: {build['cuda']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    driver, needed = _driver_version(), int(build["nvcc"].split(".")[0])
    if driver is not None and driver[0] < needed:
        return (
            f"built by nvcc {build['nvcc']} for drivers of CUDA {needed}, this one is of CUDA {driver[0]}.{driver[1]}: "
            f"update it, or install the package again with an older nvcc first on PATH"
        )
    architectures = build["cuda_architectures"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not any(_runs(architecture, major, minor) for architecture in architectures):
            return (
                f"cuda:{index} has compute capability {major}.{minor}, the kernels are built for "
                f"{', '.join(architectures)} (CUDAARCHS chooses others when the package is installed)"
            )
    return None


def _driver_version() -> tuple[int, int] | None:
    """The CUDA release that the driver supports; None where it does not say."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def build_outcome() -> dict:
    """What the build wrote down: "built", "reason", "library", "compiler", "torch", "cuda" (None, or why there are no
    CUDA kernels), "cuda_architectures" and "nvcc". Empty where nothing was built."""
    try:
        return json.loads((_FOLDER / "_build.json").read_text())
    except FileNotFoundError:
        return {}


def _runs(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture, in CMake's words ("90a-real", "100-virtual"), runs on a compute capability."""
    name, _, kind = architecture.partition("-")
    built = divmod(int(name.rstrip("af")), 10)
    if name.endswith("a"):  # for that GPU alone
        return built == (major, minor)
    same_generation = built[0] == major and built[1] <= minor
    return same_generation if kind == "real" or name.endswith("f") else built <= (major, minor)


def projection_gram(x: Tensor, stride: int, *, hopper: bool = False) -> Gram:
    """Second moments of x_s around a pivot, from which a projection's batch statistics follow without its output.

    Returns gram `[C, C]` = sum (x_s - pivot)^T (x_s - pivot), total `[C]` = sum (x_s - pivot) and pivot `[C]`, all in
    acc. On a CPU the pivot is the mean of the first 64 rows of x_s, or of all when there are fewer, and keeps the
    variance right where the mean is a thousand standard deviations; on CUDA it is 0.

    hopper: by TMA and wgmma, for GPUs of compute capability 9.0; so in all functions of this module.
    """
    return Gram(*_ops(x).gram(x, stride, hopper))


def projection_fprop(
    x: Tensor,
    weight: Tensor,
    bn: Tensor,
    stride: int,
    residual: Tensor | None = None,
    relu: bool = False,
    *,
    hopper: bool = False,
) -> Tensor:
    """scale * (x_s weight^T) + shift (+ residual) (ReLU), `[N, Ho, Wo, K]`, summed in acc, rounded once to x's dtype.

    weight `[K, C]` in x's dtype; bn `[4, K]` in acc with rows mean, rstd, scale, shift; residual `[N, Ho, Wo, K]`.
    """
    return _ops(x).fprop(x, weight, bn, residual, relu, stride, hopper)


def projection_conv(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, ChannelStats]:
    """y = x_s weight^T, `[N, Ho, Wo, K]`, and the statistics of the rounded y; weight `[K, C]` in x's dtype.

    On CUDA only; elsewhere it raises NotImplementedError.
    """
    y, *stats = _ops(x).conv(x, weight, stride)
    return y, ChannelStats(*stats)


def projection_wgrad(
    g: Tensor,
    x: Tensor,
    stride: int,
    out: Tensor | None = None,
    with_sum: bool = True,
    *,
    hopper: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """g'^T x_s `[K, C]` and the sum of g' over its rows `[K]` (None unless `with_sum`), in acc.

    g `[N, Ho, Wo, K]` in x's dtype. g' is g where the ReLU that gave `out` `[N, Ho, Wo, K]` let a value pass, else 0;
    without `out` it is g.
    """
    return _ops(x).wgrad(g, x, out, with_sum, stride, hopper)


def projection_dgrad(
    dx: Tensor,
    g: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor | None,
    k: Tensor | None,
    stride: int,
    out: Tensor | None = None,
    relu: bool = False,
    v_scale: Tensor | None = None,
    d: Tensor | None = None,
    *,
    hopper: bool = False,
) -> None:
    """dx[:, ::stride, ::stride] += g' u + v_scale*(x_s v) + d*x_s + k, in place; summed in acc and rounded once to dx's
    dtype.

    dx and x `[N, H, W, C]`, u `[K, C]`, v `[C, C]` or None in x's dtype; k and d `[C]` in acc or None, v_scale `[]` in
    acc or None, which is 1; g and out as in `projection_wgrad`. relu: x is a ReLU's output, and
    what reaches dx[:, ::stride, ::stride] is 0 where x_s <= 0. The other pixels of dx stay as they are.
    """
    _ops(x).dgrad(dx, g, x, u, v, k, out, relu, v_scale, d, stride, hopper)


def _ops(x: Tensor):
    """The ops of the library, that has to be there for x's device."""
    reason = cuda_available() if x.is_cuda else available()
    if reason is not None:
        raise RuntimeError(f"the projection extension is not available: {reason}")
    return torch.ops.fastres_projection


def _register_fakes() -> None:
    register = torch.library.register_fake

    def output(x, k, stride):
        n, h, w, _ = x.shape
        return x.new_empty(n, (h + stride - 1) // stride, (w + stride - 1) // stride, k)

    @register("fastres_projection::gram")
    def _(x, stride, hopper=False):
        c = x.shape[3]
        return tuple(x.new_empty(size, dtype=acc_dtype(x.dtype)) for size in ((c, c), (c,), (c,)))

    @register("fastres_projection::fprop")
    def _(x, weight, bn, residual, relu, stride, hopper=False):
        return output(x, weight.shape[0], stride)

    @register("fastres_projection::conv")
    def _(x, weight, stride):
        y = output(x, weight.shape[0], stride)
        partials = (y.shape[:3].numel() + 127) // 128  # portable::fprop_partials
        sizes = ((partials,), (partials, weight.shape[0]), (partials, weight.shape[0]))
        return y, *(x.new_empty(size, dtype=acc_dtype(x.dtype)) for size in sizes)

    @register("fastres_projection::wgrad")
    def _(g, x, out, with_sum, stride, hopper=False):
        p = x.new_empty(g.shape[3], x.shape[3], dtype=acc_dtype(x.dtype))
        return p, x.new_empty(g.shape[3], dtype=acc_dtype(x.dtype)) if with_sum else None

    @register("fastres_projection::dgrad")
    def _(dx, g, x, u, v, k, out, relu, v_scale, d, stride, hopper=False):
        return None
