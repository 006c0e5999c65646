"""The CUDA kernels on the CPU: compiles them against the emulation in this folder and calls them on torch tensors.

`Builder` compiles, `Kernels` calls. Functions have the kernels' names and signatures, on bfloat16 and float16 tensors
`[N, H, W, C]` whose channels are contiguous, and take `path`, "portable" or "hopper". What the emulation finds wrong is
raised as `EmulationError`, with the kernel's file and line.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
PROJECTION = FOLDER.parents[1] / "kernels" / "projection"
SOURCES = sorted((PROJECTION / "cuda").glob("*.cu"))
MACHINE = [FOLDER / name for name in ("emulation.cpp", "emulation_hopper.cpp", "fibers.cpp", "harness.cpp")]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PATHS = ("portable", "hopper")
_LANDINGS = ("late", "early", "random")
# Elements on both sides of an output that must stay as they are.
_GUARD = 512


class EmulationError(RuntimeError):
    """What the emulation found wrong in a kernel."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, c++ or clang++; None when none of them compiles C++20."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    program = "#include <source_location>\nint main() { return std::source_location::current().line() == 0; }\n"
    for name in names:
        command = [*name.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        if shutil.which(command[0]):
            if subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0:
                return name
    return None


class Builder:
    """Compiles sources and links them with the emulation; objects are kept in `cache` by what they were made from."""

    def __init__(self, cache: Path, cxx: str, jobs: int = 2):
        self.cache, self.cxx, self.jobs = cache, cxx.split(), jobs
        cache.mkdir(parents=True, exist_ok=True)

    def library(self, sources: Sequence[Path]) -> Path:
        """A library of `sources`, the emulation's included."""
        return self.libraries([(sources, PROJECTION)])[0]

    def libraries(self, requests: Sequence[tuple[Sequence[Path], Path]]) -> list[Path]:
        """Several at once: of sources, with headers from the folder of projection.h that is given with them."""
        with open(self.cache / "lock", "w") as lock:  # Several processes of one session share the folder.
            fcntl.flock(lock, fcntl.LOCK_EX)
            wanted = [[self._object(source, projection) for source in sources] for sources, projection in requests]
            missing = {target: command for objects in wanted for target, command in objects if not target.exists()}
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self._run, missing.values(), missing))
                return list(pool.map(lambda objects: self._link([target for target, _ in objects]), wanted))

    def _link(self, objects: list[Path]) -> Path:
        name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
        library = self.cache / f"{name}.so"
        if not library.exists():
            self._run(["-shared", *map(str, objects)], library)
        return library

    def _object(self, source: Path, projection: Path) -> tuple[Path, list[str]]:
        """Where its object is, and the command that makes it."""
        folders = [FOLDER, projection, projection / "cuda"]
        # The emulation is worth optimizing; kernels are not, they wait for each other most of the time.
        level = "-O2" if source in MACHINE else "-O1"
        options = ["-std=c++20", level, "-fPIC", "-ffp-contract=off", "-w"]
        contents = [path.read_bytes() for path in _included(source, folders)]
        made_from = hashlib.sha256(repr([self.cxx, options, contents]).encode()).hexdigest()[:20]
        target = self.cache / f"{source.stem}-{made_from}.o"
        paths = [f"-I{folder}" for folder in folders]
        return target, [*options, *paths, "-c", "-x", "c++", str(source)]

    def _run(self, arguments: list[str], target: Path) -> None:
        made = target.with_suffix(".new")  # What is interrupted leaves no half of a file.
        command = [*self.cxx, "-o", str(made), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
        made.replace(target)


def _included(source: Path, folders: Sequence[Path]) -> list[Path]:
    """`source` and the files of ours that it includes, directly or not."""
    found: list[Path] = []
    left = [source]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            candidates = [(folder / name).resolve() for folder in (path.parent, *folders)]
            left += [candidate for candidate in candidates if candidate.exists()][:1]
    return sorted(found, key=lambda path: path.name)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n", "h", "w", "c", "k", "stride")]


class _Pixels(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *[(name, ctypes.c_int64) for name in ("n_stride", "h_stride", "w_stride")]]


class Line(NamedTuple):
    """Profile of one kind of access on one line: requests of a warp, cycles added by bank conflicts, sectors of 32
    bytes, and how few would hold the bytes that the lanes ask for (fewer still if several ask for the same)."""

    file: str
    line: int
    what: str
    requests: int
    conflicts: int
    sectors: int
    ideal: int


class Kernels:
    """The kernels of a library that `Builder` made."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        boolean = ctypes.c_bool
        self.library.emulation_options.argtypes = [ctypes.c_int, boolean, ctypes.c_uint32, boolean, boolean, boolean]
        for name in ("counters", "profile", "unwritten"):
            getattr(self.library, f"emulation_{name}").restype = ctypes.c_char_p
        for name in ("fprop", "gram", "wgrad", "dgrad"):
            getattr(self.library, f"projection_{name}").restype = ctypes.c_char_p
        self.library.projection_size.restype = ctypes.c_int64
        self._set()

    def _set(self, landing="late", shuffled=False, seed=1, races=True, bounds=True, profile=False) -> None:
        self.library.emulation_options(_LANDINGS.index(landing), shuffled, seed, races, bounds, profile)

    @contextlib.contextmanager
    def options(self, **options) -> Iterator[None]:
        """How kernels run meanwhile; counters and profile begin at zero.

        landing: when asynchronous copies arrive, "late" (as is legal), "early" (as they are issued) or "random".
        shuffled: threads and blocks run in an order drawn from `seed`. races, bounds, profile: what is checked.
        """
        self._set(**options)
        try:
            yield
        finally:
            self._set()

    def counters(self) -> dict[str, int]:
        return json.loads(self.library.emulation_counters())

    def profile(self) -> list[Line]:
        """What was counted since `options(profile=True)` began; to be read before it ends."""
        return [Line(*row) for row in json.loads(self.library.emulation_profile())]

    def projection_fprop(
        self, x: Tensor, weight: Tensor, bn: Tensor, stride: int, residual: Tensor | None = None, relu: bool = False,
        path: str = "portable", into: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """relu(scale * (x_s weight^T) + shift + residual), `[N, Ho, Wo, K]`; `into`: where to write it."""
        out = _Output.pixels(x, weight.shape[0], stride, into)
        self._call(
            "fprop", path, x, _shape(x, weight.shape[0], stride), _pixels(x), _pointer(weight), _pointer(bn),
            _pixels(residual), ctypes.c_bool(relu), _pixels(out.tensor), None, None, None, outputs=[out],
        )  # fmt: skip
        return out.tensor

    def projection_conv(
        self, x: Tensor, weight: Tensor, stride: int, path: str = "portable", into: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, count, mean, m2): x_s weight^T and the Welford partials of its channels, `[P]`, `[P, K]`, `[P, K]`."""
        k = weight.shape[0]
        shape = _shape(x, k, stride)
        partials = self._size("fprop_partials", path, shape)
        y = _Output.pixels(x, k, stride, into)
        count, mean, m2 = _Output.dense(partials), _Output.dense(partials, k), _Output.dense(partials, k)
        self._call(
            "fprop", path, x, shape, _pixels(x), _pointer(weight), None, _pixels(None), ctypes.c_bool(False),
            _pixels(y.tensor), *[_pointer(t.tensor) for t in (count, mean, m2)], outputs=[y, count, mean, m2],
        )  # fmt: skip
        return y.tensor, count.tensor, mean.tensor, m2.tensor

    def projection_gram(self, x: Tensor, stride: int, path: str = "portable") -> tuple[Tensor, Tensor]:
        """(gram, total): x_s^T x_s `[C, C]` and the sum of x_s `[C]`."""
        c, shape = x.shape[3], _shape(x, 0, stride)
        gram, total = _Output.dense(c, c), _Output.dense(c)
        workspace = _Output.dense(self._size("gram_workspace", path, shape))
        outputs = [gram, total, workspace]
        self._call("gram", path, x, shape, _pixels(x), *[_pointer(t.tensor) for t in outputs], outputs=outputs)
        return gram.tensor, total.tensor

    def projection_wgrad(
        self, g: Tensor, x: Tensor, stride: int, out: Tensor | None = None, with_sum: bool = True,
        path: str = "portable",
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(p, sum): g'^T x_s `[K, C]` and the sum of g' `[K]`, where g' is g where ~(out <= 0)."""
        k, c = g.shape[3], x.shape[3]
        shape = _shape(x, k, stride)
        p, total = _Output.dense(k, c), _Output.dense(k)
        workspace = _Output.dense(self._size("wgrad_workspace", path, shape))
        self._call(
            "wgrad", path, x, shape, _pixels(g), _pixels(x), _pixels(out), _pointer(p.tensor),
            _pointer(total.tensor if with_sum else None), _pointer(workspace.tensor), outputs=[p, total, workspace],
        )  # fmt: skip
        return p.tensor, total.tensor if with_sum else None

    def projection_dgrad(
        self, dx: Tensor, g: Tensor, x: Tensor, u: Tensor, v: Tensor | None, k: Tensor | None, stride: int,
        out: Tensor | None = None, relu: bool = False, v_scale: Tensor | None = None, d: Tensor | None = None,
        path: str = "portable",
    ) -> None:  # fmt: skip
        """dx[:, ::stride, ::stride] += g' u + v_scale * x_s v + d * x_s + k, in place; with `relu` 0 where x_s <= 0."""
        self._call(
            "dgrad", path, x, _shape(x, g.shape[3], stride), _pixels(dx), _pixels(g), _pixels(x), _pixels(out),
            *map(_pointer, (u, v, k, v_scale, d)), ctypes.c_bool(relu), outputs=[_Output.inside(dx, stride)],
        )  # fmt: skip

    def workspace(self, kernel: str, path: str, sizes: Sequence[int]) -> int:
        """Floats of working memory of "gram" or "wgrad" for n, h, w, c, k, stride."""
        return self._size(f"{kernel}_workspace", path, _Shape(*sizes))

    def _size(self, what: str, path: str, shape: _Shape) -> int:
        size = self.library.projection_size(what.encode(), ctypes.c_bool(_PATHS.index(path)), ctypes.byref(shape))
        if size < 0:
            raise RuntimeError(f"the library was linked without {path}'s {what}")
        return size

    def _call(self, name: str, path: str, x: Tensor, shape: _Shape, *arguments, outputs: list[_Output]) -> None:
        references = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in (shape, *arguments)]
        hopper = ctypes.c_bool(_PATHS.index(path))
        error = getattr(self.library, f"projection_{name}")(hopper, _DTYPES[x.dtype], *references)
        if error is not None:
            raise EmulationError(error.decode())
        for output in outputs:
            output.check()


class _Output:
    """A tensor to write to, NaN at first, within a larger one of which nothing else may change."""

    def __init__(self, tensor: Tensor, around: Tensor, mine: Tensor):
        self.tensor = tensor
        self._around, self._before, self._mine = around, around.clone(), mine

    @classmethod
    def dense(cls, *size: int, dtype: torch.dtype = torch.float32) -> _Output:
        elements = torch.Size(size).numel()
        around = torch.full([elements + 2 * _GUARD], torch.nan, dtype=dtype)
        mine = torch.zeros(around.shape, dtype=torch.bool)
        mine[_GUARD : _GUARD + elements] = True
        return cls(around[_GUARD : _GUARD + elements].view(size), around, mine)

    @classmethod
    def pixels(cls, x: Tensor, channels: int, stride: int, into: Tensor | None) -> _Output:
        size = [*x[:, ::stride, ::stride].shape[:3], channels]
        if into is None:
            return cls.dense(*size, dtype=x.dtype)
        assert list(into.shape) == size
        return cls.inside(into, 1)

    @classmethod
    def inside(cls, tensor: Tensor, stride: int) -> _Output:
        """The strided pixels of `tensor`, in whatever memory that is part of."""
        storage = tensor.untyped_storage()
        if storage.nbytes() > 2**28:  # Address space that is mostly not there.
            empty = tensor.new_empty(0)
            return cls(tensor, empty, empty.bool())
        around = torch.empty(0, dtype=tensor.dtype).set_(storage)
        mine = torch.zeros(around.shape, dtype=torch.bool)
        mine.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[:, ::stride, ::stride] = True
        return cls(tensor, around, mine)

    def check(self) -> None:
        integer = {2: torch.int16, 4: torch.int32}[self._around.element_size()]
        changed = (self._around.view(integer) != self._before.view(integer)) & ~self._mine
        if changed.any():
            raise EmulationError(f"memory around an output changed, first at element {int(changed.nonzero()[0])} of it")


def _shape(x: Tensor, k: int, stride: int) -> _Shape:
    return _Shape(*x.shape, k, stride)


def _pixels(t: Tensor | None) -> _Pixels:
    if t is None:
        return _Pixels(None, 0, 0, 0)
    assert t.dim() == 4 and (t.stride(3) == 1 or t.shape[3] == 1)
    return _Pixels(t.data_ptr(), *t.stride()[:3])


def _pointer(t: Tensor | None) -> ctypes.c_void_p | None:
    if t is None:
        return None
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())
