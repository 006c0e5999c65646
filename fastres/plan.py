"""Which launcher runs each kernel of a fused unit, and which form a unit has: the one place where that is decided.

A plan is a namespace `k` with one launcher per kernel name; the bodies in `fastres.functional` read `k.conv1x1(...)`
and know nothing of backends. Flags beside the launchers say which lists of calls they run:

- `k.gram_folding`: the block's own list, in which a bottleneck's last conv is Gram-folded, or the stored one
  (`fastres.functional._residual`).
- `k.fold_projection`: in a block's own list, whether the projection is folded too, or its raw output stored.
- `k.one_pass`: whether both gradients of a bottleneck's first conv come out of one pass (`conv1x1_bwd`).

On a CPU launches cost little and blocks are folded for the memory, although the stored form can be the faster one
there. On a GPU the flags follow from channel counts alone, so that no batch size changes what is saved for backward, by
a model of bytes and products (docs/arithmetic.md, "What the plan folds, and chooses"). Launchers that both Triton and
the library offer are chosen call by call (`PerCall`): by what was measured on this GPU for these shapes
(`fastres.tuned`), else by a model.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.reference.conv1x1 import ONE_PASS_CHANNELS
from fastres.kernels.reference.conv3x3 import in_boxes

from . import backends, tuned
from .parts import Part

ENVIRONMENT_VARIABLE = "FASTRES_BACKEND"

_FOLDED_PROJECTION = ("projection_gram", "projection_fprop", "projection_wgrad", "projection_dgrad")
_EXTENSION_IN_BLOCKS = ("projection_gram", "projection_conv", "projection_dgrad")

CONV3X3 = ("conv3x3", "conv3x3_dgrad", "conv3x3_wgrad")
"""Kernels that the library takes as a convolution with passes around it; the passes are Triton's where Triton runs."""

_PASSES = ("channel_stats", "bn_act", "bn_bwd_mask", "add_masked")
"""What those functions of the library ask of the namespace of passes."""

BY_COST = (
    *("conv1x1", "conv1x1_bwd", "conv1x1_dgrad", "conv1x1_wgrad"),
    *CONV3X3,
    *("expand", "expand_dgrad", "expand_wgrad", "gram"),
)
"""Kernels whose matrix products the library may do faster than Triton: chosen call by call on a GPU."""

# Where the extension's CPU kernels beat the library's on most of ResNet-50's shapes on an AMD EPYC with AVX-512
# (benchmarks/kernels/test_projection.py): all four in float32, though not on layer1's wgrad and layer4's fprop; in
# bfloat16, where oneDNN multiplies natively, only the Gram, while the library's dgrad still summed in bfloat16.
_EXTENSION_ON_CPU = {torch.float32: _FOLDED_PROJECTION, torch.bfloat16: ("projection_gram",)}

_PADDED = (4, 8)
"""Channels that a convolution of images in 16 bits may be padded to on a GPU."""

_FEWEST_CHANNELS = 32
"""Of a 3x3 convolution that Triton is chosen for: half of its smallest tile."""

_wrap: Callable[[SimpleNamespace], SimpleNamespace] | None = None
_device: torch.device | None = None
_part: Part | None = None


class Choice(NamedTuple):
    """The launcher for one call. reason: what it was preferred to, and by what figures."""

    launcher: Callable
    reason: str


class PerCall:
    """A launcher that hands each call to the fastest of several for one kernel.

    Seconds are the tuned table's where it has the call for all of them, else modelled (`fastres.cost.seconds`). The
    first call of new shapes works them out; those after it find them.

    launchers: by name, a namespace or a form of one ("pad 8"). only_library: gives, for the arguments of a call by
    name, the reason why none but the library's should take it, or None.
    """

    def __init__(
        self,
        kernel: str,
        launchers: dict[str, Callable],
        only_library: Callable[[dict[str, object]], str | None] | None = None,
    ):
        self.kernel, self.launchers, self.only_library = kernel, launchers, only_library
        self._choices: dict[tuple, Choice] = {}

    def __call__(self, *args, **kwargs):
        return self.choose(args, kwargs).launcher(*args, **kwargs)

    def choose(self, args: tuple, kwargs: dict[str, object]) -> Choice:
        """The choice for a call, whose tensors may be on the meta device."""
        named = tuple((name, _shape(value)) for name, value in kwargs.items())
        key = tuple(_shape(value) for value in args), named, _part and _part.name
        if key not in self._choices:
            self._choices[key] = self._work_out(args, kwargs)
        return self._choices[key]

    def _work_out(self, args: tuple, kwargs: dict[str, object]) -> Choice:
        from .cost import seconds  # which imports this module

        call = seconds.Call.of(self.kernel, args, kwargs)
        reason = self.only_library and self.only_library(call.arguments)
        if reason is not None:
            return Choice(self.launchers["library"], reason)
        found, how = tuned.seconds(call.device, call.label), "measured"
        if found is None or not set(self.launchers) <= set(found):
            found = {name: call.modelled(name, launcher, _part) for name, launcher in self.launchers.items()}
            how = "modelled"
        # What takes as long is rather the library's.
        ordered = sorted(self.launchers, key=lambda name: (found[name], name != "library"))
        best, *others = (f"{1e6 * found[name]:.0f}" for name in ordered)
        left = ", ".join(f"{name} {other}" for name, other in zip(ordered[1:], others, strict=True))
        return Choice(self.launchers[ordered[0]], f"{how} {best}, {left}")


def _not_in_boxes(arguments: dict[str, object]) -> str | None:
    if not in_boxes(*(arguments[name] for name in ("stride", "dilation", "groups"))):
        return "Triton has no groups, and no dilation at a stride"
    # The model counts products, of which Triton's tiles would compute many times as many.
    weight = arguments.get("weight")
    channels = weight.shape[:2] if weight is not None else (arguments["x"].shape[-1], arguments["dy"].shape[-1])
    if min(channels) < _FEWEST_CHANNELS or any(count % 8 for count in channels):
        return "too few channels for Triton's tiles, or not a multiple of 8"
    return None


def _not_of_images(arguments: dict[str, object]) -> str | None:
    few = arguments["x"].shape[-1] < min(_PADDED)
    return None if few and arguments["groups"] == 1 else "there is nothing to pad"


def _shape(value: object) -> object:
    """What of an argument a choice depends on."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


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
    return _wrapped(_resolve(dtype, _planned(device).type, requested(backend)))


def resolve_block(
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    first: int,
    last: tuple[int, int] | None,
    projection: tuple[int, int] | None,
) -> SimpleNamespace:
    """As `resolve`, for a residual block.

    first: output channels of its first conv. last: input and output channels of its last conv where that can be folded,
    a 1x1 one. projection: those of its projection shortcut, where it has one.
    """
    return _wrapped(_resolve_block(dtype, _planned(device).type, requested(backend), first, last, projection))


def form_of_block(
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    first: int,
    last: tuple[int, int] | None,
    projection: tuple[int, int] | None,
) -> str:
    """The form of the block for which `resolve_block` takes these arguments, in words, with the reason for it."""
    k = resolve_block(dtype, device, backend, first, last, projection)
    costs = "{} channels would cost more products than it saves bytes (modelled)"
    if last is None:
        folds = projection is not None and k.gram_folding and k.fold_projection
        return "convs stored" + (", projection Gram-folded" if folds else "")
    if not k.gram_folding:
        if origin(k.expand) == "triton":
            return f"convs stored: {costs.format(f'folding {last[0]}')}"
        float32 = dtype == torch.float32 and requested(backend) == "auto"
        return "convs stored: " + (
            "products of float32 are the library's" if float32 else "Triton's kernels do not run"
        )
    if projection is None:
        return "Gram-folded"
    if k.fold_projection:
        return "Gram-folded, projection too"
    if origin(k.projection_conv) == "projection":
        return f"Gram-folded, projection stored: {costs.format(f'folding its {projection[0]}')}"
    return "Gram-folded, projection stored: the projection extension does not run"


def resolve_projection(x: Tensor, output_shape: tuple[int, ...], backend: str = "auto") -> SimpleNamespace:
    """As `resolve`, for a projection shortcut outside of a block: x `[N, H, W, C]`, its output `[N, Ho, Wo, K]`."""
    name, device = requested(backend), _planned(x.device).type
    k = _resolve(x.dtype, device, name)
    if name == "auto" and _extension_on_gpu(x.dtype, device):
        *pixels, outputs = output_shape
        strided = tuple(pixels[1:]) != tuple(x.shape[1:3])
        few_launches = origin(k.gram_bwd) == "triton"
        if seconds_saved_by_folding(math.prod(pixels), x.shape[3], outputs, strided, few_launches) > 0:
            k = _resolve_projection(x.dtype, device)
    return _wrapped(k)


# Bytes/s and FLOP/s of an H200 that the models of folding take: memory as measured by copies; `mma.sync`, Triton's
# products and the library's as assumed. docs/arithmetic.md has the derivations.
_MEMORY, _MMA_SYNC, _TRITON, _LIBRARY = 4.3e12, 350e12, 400e12, 600e12


def seconds_saved_by_folding(pixels: int, channels: int, outputs: int, strided: bool, few_launches: bool) -> float:
    """Of a training step of a projection shortcut on a GPU, by the extension's Gram-folded form instead of the stored
    form by the library's convolution; negative where folding costs time.

    A model, not a measurement, whose terms docs/arithmetic.md derives ("The projection shortcut on a GPU").
    pixels: of the output. strided: the library gathers the pixels that it reads. few_launches: Triton's kernels do the
    work on the small matrices, not PyTorch's operators.
    """
    small_matrices = 3e-5 if few_launches else 2e-4
    bytes_saved = 2 * (8 * outputs + (3 if strided else -3) * channels)
    more_flops, common_flops = 3 * channels**2, 6 * channels * outputs
    slower = more_flops / _MMA_SYNC + common_flops * (1 / _MMA_SYNC - 1 / _LIBRARY)
    return pixels * (bytes_saved / _MEMORY - slower) - small_matrices


def seconds_saved_per_pixel(channels: int, outputs: int, folds: str) -> float:
    """Of a training step of a block on a GPU, for each pixel of its output, by folding its "last conv", or the
    "projection of a bottleneck" or "of a basic block", instead of storing the raw output.

    A model, not a measurement: docs/arithmetic.md, "What the plan folds, and chooses". channels, outputs: of the conv.
    """
    elements_saved = {
        "last conv": 8 * outputs,
        "projection of a bottleneck": 7 * outputs - 2 * channels,
        "projection of a basic block": 2 * outputs - 2 * channels,
    }[folds]
    return 2 * elements_saved / _MEMORY - 3 * channels**2 / (_TRITON if folds == "last conv" else _MMA_SYNC)


@contextlib.contextmanager
def wrapping(wrap: Callable[[SimpleNamespace], SimpleNamespace]) -> Iterator[None]:
    """Inside, `resolve` gives `wrap(k)` in place of k: how a unit's kernel calls are counted."""
    global _wrap
    before, _wrap = _wrap, wrap
    try:
        yield
    finally:
        _wrap = before


@contextlib.contextmanager
def planning_for(device: torch.device | None = None, part: Part | None = None) -> Iterator[None]:
    """Inside, tensors of any device get the plan of `device`, and calls are modelled for `part`, as far as given: how a
    unit is counted on the meta device.
    """
    global _device, _part
    before = _device, _part
    _device, _part = device or _device, part or _part
    try:
        yield
    finally:
        _device, _part = before


def _planned(device: torch.device) -> torch.device:
    return device if _device is None else _device


def _wrapped(k: SimpleNamespace) -> SimpleNamespace:
    return k if _wrap is None else _wrap(k)


@functools.cache
def _resolve(dtype: torch.dtype, device_type: str, backend: str) -> SimpleNamespace:
    namespaces = _preference(dtype, device_type, backend)
    modules = [backends.load(namespace) for namespace in namespaces]
    names = backends.load("reference").__all__
    chosen = {name: next(getattr(module, name) for module in modules if hasattr(module, name)) for name in names}
    on_gpu = device_type != "cpu"
    if backend == "auto" and not on_gpu and backends.reason("projection") is None:
        extension = backends.load("projection")
        chosen |= {name: getattr(extension, name) for name in _EXTENSION_ON_CPU.get(dtype, ())}
    if backend == "auto" and "triton" in namespaces:
        passes = SimpleNamespace(**{name: chosen[name] for name in _PASSES})
        library = {name: getattr(modules[1], name) for name in BY_COST}
        library |= {name: functools.partial(library[name], passes=passes) for name in CONV3X3}
        if dtype == torch.float32:
            # Products are the library's, where TF32 may be allowed.
            chosen |= library
        else:
            only_library = dict.fromkeys(CONV3X3, _not_in_boxes)
            for name in BY_COST:
                launchers = {"triton": chosen[name], "library": library[name]}
                chosen[name] = PerCall(name, launchers, only_library.get(name))
    if backend == "auto" and on_gpu and dtype.itemsize == 2:
        chosen |= {name: _of_images(name, chosen[name]) for name in ("conv2d", "conv2d_wgrad")}
    everything = not on_gpu or namespaces == ("reference",)
    return SimpleNamespace(
        **chosen,
        gram_folding=everything,
        fold_projection=everything,
        one_pass=everything,
    )


def _of_images(kernel: str, launcher: Callable) -> PerCall:
    padded = getattr(backends.load("library.padded"), kernel)
    forms = {f"pad {count}": functools.partial(padded, channels=count) for count in _PADDED}
    return PerCall(kernel, {"library": launcher} | forms, _not_of_images)


@functools.cache
def _resolve_block(
    dtype: torch.dtype,
    device_type: str,
    backend: str,
    first: int,
    last: tuple[int, int] | None,
    projection: tuple[int, int] | None,
) -> SimpleNamespace:
    k = _resolve(dtype, device_type, backend)
    if origin(k.expand) != "triton" or (last is not None and seconds_saved_per_pixel(*last, folds="last conv") <= 0):
        return k
    flags = {"gram_folding": True, "one_pass": first <= ONE_PASS_CHANNELS and dtype != torch.float32}
    flags["projection_conv"] = k.conv1x1  # the same contract, where the extension does not serve it
    if projection is not None and backend == "auto" and _extension_on_gpu(dtype, device_type):
        extension = backends.load("projection")
        # In a bottleneck the projection is folded inside of `expand` and `expand_wgrad`.
        folds, names = "projection of a bottleneck", _EXTENSION_IN_BLOCKS
        if last is None:
            folds, names = "projection of a basic block", ("projection_conv", *_FOLDED_PROJECTION)
        flags |= {name: getattr(extension, name) for name in names}
        flags["fold_projection"] = seconds_saved_per_pixel(*projection, folds=folds) > 0
    return SimpleNamespace(**vars(k) | flags)


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


def in_form(k: SimpleNamespace, **flags: bool) -> SimpleNamespace:
    """The same launchers, with these flags whatever the plan says."""
    return SimpleNamespace(**vars(k) | flags)


def choose(launcher: Callable, args: tuple, kwargs: dict[str, object]) -> Choice:
    """What runs a call of one of a plan's launchers, and why."""
    return launcher.choose(args, kwargs) if isinstance(launcher, PerCall) else Choice(launcher, "")


def with_passes(launcher: Callable, change: Callable[[SimpleNamespace], SimpleNamespace]) -> Callable:
    """A launcher of `CONV3X3` with its passes changed; any other as it is."""
    if not isinstance(launcher, functools.partial) or "passes" not in launcher.keywords:
        return launcher
    return functools.partial(launcher.func, passes=change(launcher.keywords["passes"]))


def launchers(k: SimpleNamespace) -> dict[str, Callable]:
    """The launchers of a plan by name."""
    return {name: value for name, value in vars(k).items() if callable(value)}


def origin(launcher: Callable) -> str:
    """The namespace of `fastres.kernels` that a launcher is from; of a `PerCall`, that of its first."""
    if isinstance(launcher, PerCall):
        launcher = next(iter(launcher.launchers.values()))
    if isinstance(launcher, functools.partial):
        launcher = launcher.func
    return launcher.__module__.split(".kernels.")[1].split(".")[0]
