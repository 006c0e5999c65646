"""Compile Triton kernels for GPUs that are not there, and read what decides whether they are fast.

A case of `fastres.cases` runs on the meta device, where tensors have shapes only; each launch that it makes is recorded
and compiled, as that launch would compile it, for one part (compute capability: 80, 90, 100). Registers, stack and
instructions come from the cubin, by cuobjdump inside the triton package; row addresses, loop stages and matrix products
from Triton's own IR. `fastres.inspection` judges the figures.

The work is done by a process of its own, without TRITON_INTERPRET. Results are kept under the user's cache folder, by a
hash of the kernel's source with all that it calls, its arguments and Triton's version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from . import cases

PARTS = (80, 90, 100)
"""The compute capabilities that kernels have configurations for; others use those of the newest older one."""


class Limits(NamedTuple):
    """What one SM lets programs use. shared: bytes of shared memory for one of them. warps, programs: resident ones."""

    shared: int
    warps: int
    programs: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
LIMITS = {
    80: Limits(163 * 1024, 64, 32),
    86: Limits(99 * 1024, 48, 16),
    89: Limits(99 * 1024, 48, 24),
    90: Limits(227 * 1024, 64, 32),
    100: Limits(227 * 1024, 64, 32),
}
_REGISTERS_OF_SM = 65536
_SHARED_RESERVED = 1024  # bytes of each resident program
TENSOR_MEMORY_OF_SM = 512  # columns; from 100 on

_FORMAT = 4  # of the cached results; counts what is read from a kernel

_INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",
    "HGMMA with A in registers": r"\bHGMMA\.\S+ R\d+, R\d+",
    "HMMA": r"\bHMMA\b",
    "UTCMMA": r"\bUTC\w*MMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "UTMASTG": r"\bUTMASTG\b",
    "spill": r"\b(?:STL|LDL)\b",
}
_GLOBAL_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\b((?:\.\w+)*)")
_DOT = re.compile(r"= tt\.dot .*: tensor<(?:\d+x)+(\w+)> \*")
_LOOP_STAGES = re.compile(r"tt\.num_stages = (\d+)")


@dataclass(frozen=True)
class Request:
    """A case of `fastres.cases` by name, the dtype of its activations ("bfloat16") and the sizes to make it with.

    tile: of GEMMs, which of the tiles they can choose from: 0 is the preferred one.
    """

    case: str
    dtype: str
    sizes: tuple[tuple[str, object], ...]  # hashable, so that a request can be a key
    tile: int = 0

    def __str__(self) -> str:
        tile = f"; tile {self.tile}" if self.tile else ""
        return f"{self.case}; {self.dtype}; {', '.join(f'{name} {size}' for name, size in self.sizes)}{tile}"

    @staticmethod
    def of(case: str, dtype: torch.dtype, tile: int = 0, **sizes: object) -> Request:
        return Request(case, str(dtype).removeprefix("torch."), tuple(sizes.items()), tile)


@dataclass(frozen=True)
class Figures:
    """What one launch compiled to, for one part.

    configuration: the kernel's constexprs. programs: how many the launch starts. num_stages: of its loops, the largest.
    shared, stack: bytes. tensor_memory: columns. instructions: how many of each kind stand in the code (global accesses
    by their width in bits: "LDG.128", "STG.32"; LDGSTS is cp.async, UTMALDG and UTMASTG are TMA's loads and stores,
    UTCMMA is tcgen05). dots: how many matrix products the source asks for, by the bits of an operand's values ("16").
    narrow_rows: accesses to tiles whose row addresses are not formed in 64 bits. downward_loops: loops whose step may
    be negative, which the interpreter runs and a compiled kernel leaves out. error: why it does not compile; what only
    a compiled kernel has is then 0.
    """

    kernel: str
    part: int
    configuration: dict[str, object]
    programs: int
    num_warps: int
    num_stages: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    dots: dict[str, int] = field(default_factory=dict)
    narrow_rows: list[str] = field(default_factory=list)
    downward_loops: list[str] = field(default_factory=list)
    error: str | None = None

    def count(self, instruction: str) -> int:
        """How many times an instruction stands in the code."""
        return self.instructions.get(instruction, 0)

    @property
    def spills(self) -> int:
        return self.count("spill")

    @property
    def widths(self) -> list[int]:
        """Bits of the narrowest to the widest global access; TMA's are not among them."""
        return sorted({int(kind.partition(".")[2]) for kind in self.instructions if "." in kind})

    @property
    def resident(self) -> int:
        """Programs that run on one SM at the same time, by registers, shared and tensor memory, warps and number."""
        limits = LIMITS[self.part]
        registers = -(-self.registers // 8) * 8 * 32 * self.num_warps
        return min(
            _REGISTERS_OF_SM // max(1, registers),
            (limits.shared + _SHARED_RESERVED) // (self.shared + _SHARED_RESERVED),
            TENSOR_MEMORY_OF_SM // max(1, self.tensor_memory),
            limits.warps // self.num_warps,
            limits.programs,
        )


def requests(family: str, everything: bool = False) -> list[Request]:
    """What the cases of a family ask to be compiled; without `everything`, float16 and all but the preferred tiles are
    left out.

    What differs between the 16-bit dtypes is the conversions, so what is asked for in bfloat16 stands for both.
    """
    wanted = {}
    for case in cases.BY_FAMILY[family]:
        for dtype, sizes in case.static:
            for each in (dtype, torch.float16) if everything and dtype == torch.bfloat16 else (dtype,):
                for tile in range(case.tiles if everything else 1):
                    wanted[Request.of(case.name, each, tile, **sizes)] = None
    return list(wanted)


def figures(
    wanted: Iterable[Request], parts: Iterable[int] = PARTS, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[tuple[Request, int], list[Figures]]:
    """The figures of every launch of each request on each part.

    `progress(done, total)` is called as launches whose figures were not kept are compiled. Raises RuntimeError where
    the worker process fails.
    """
    jobs = [(request, part) for request in wanted for part in parts]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile("w+") as complaints:
        command = [sys.executable, "-m", __name__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": complaints}
        with subprocess.Popen(command, **pipes, env=environment, text=True) as worker:
            with contextlib.suppress(BrokenPipeError), worker.stdin:
                json.dump([(asdict(request), part) for request, part in jobs], worker.stdin)
            answer = {}
            for line in worker.stdout:
                answer = json.loads(line)
                if "done" in answer:
                    progress(answer["done"], answer["total"])
        if worker.returncode:
            complaints.seek(0)
            raise RuntimeError(f"compiling kernels failed:\n{complaints.read()}")
    results = [[Figures(**row) for row in launches] for launches in answer["figures"]]
    return dict(zip(jobs, results, strict=True))


def _worker() -> None:
    """Serve `figures`: jobs come by stdin; progress and at last the figures go to stdout, each a line of JSON."""
    # What compiling prints must not come between.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        jobs = [(Request(**request), part) for request, part in json.load(sys.stdin)]
        launches = [_launches(request, part) for request, part in jobs]

        def progress(done: int, total: int) -> None:
            print(json.dumps({"done": done, "total": total}), file=answers)

        rows = iter(compiled([launch for each in launches for launch in each], progress))
        made = [[asdict(next(rows)) for _ in each] for each in launches]
        print(json.dumps({"figures": made}), file=answers)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments (by keyword also the compiler's options), to be compiled for one part."""

    kernel: object
    part: int
    grid: tuple[int, ...]
    args: tuple[object, ...]
    kwargs: dict[str, object]

    @functools.cached_property
    def compilation(self) -> tuple[object, dict, dict, dict]:
        """Options, signature, constants and attributes, as Triton's own launcher derives them from the arguments."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", self.part, 32))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialisation, options = bind(*self.args, **self.kwargs)
        return self.kernel._pack_args(backend, self.kwargs, bound, specialisation, options)

    @property
    def key(self) -> str:
        """A hash of all that the figures depend on."""
        import triton

        options, *specialised = self.compilation
        # Paths of libraries are among the options, and no part of the result.
        options = {name: value for name, value in vars(options).items() if name != "extern_libs"}
        facts = _FORMAT, triton.__version__, self.part, self.kernel.cache_key, _fixed(specialised), _fixed(options)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _fixed(value: object) -> object:
    """The value with functions among its members replaced by hashes of their source: their own repr is an address."""
    if isinstance(value, dict):
        return [(name, _fixed(member)) for name, member in value.items()]
    if isinstance(value, (list, tuple)):
        return [_fixed(member) for member in value]
    return getattr(value, "cache_key", value)


def configuration(kernel: object, *args: object, **kwargs: object) -> dict[str, object]:
    """The constexprs that a launch gives to a kernel, which may be an interpreted one; dtypes by their name."""
    parameters = inspect.signature(kernel.fn).parameters
    given = {name: value for name, value in kwargs.items() if name in parameters}
    bound = inspect.signature(kernel.fn).bind(*args, **given)
    bound.apply_defaults()
    return {
        name: value if isinstance(value, (bool, int, float)) else str(value)
        for name, value in bound.arguments.items()
        if "constexpr" in str(parameters[name].annotation)
    }


def _launches(request: Request, part: int) -> list[Launch]:
    """What a case launches for a part."""
    from fastres.kernels import reference, triton
    from fastres.kernels.triton import _common, _gemm

    k = {name: getattr(triton if hasattr(triton, name) else reference, name) for name in reference.__all__}
    case = cases.BY_NAME[request.case]
    _common.PART_WITHOUT_GPU, _gemm.PREFERRED = _common.configured_part(part), request.tile
    with recorded(part) as launches:
        inputs = case.make(cases.Maker(getattr(torch, request.dtype), "meta"), **dict(request.sizes))
        case.run(SimpleNamespace(**k), inputs)
    return launches


@contextlib.contextmanager
def recorded(part: int) -> Iterator[list[Launch]]:
    """Meanwhile launches go to the list that this gives, instead of to a device; to be compiled for `part`."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, part, grid, args, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = original


def compiled(launches: list[Launch], progress: Callable[[int, int], None] = lambda *_: None) -> list[Figures]:
    """The figures of launches, each compiled in a process of its own, or kept from an earlier time.

    Needs a process without TRITON_INTERPRET; `progress` as in `figures`.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres" / "static"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{launch.key}.json" for launch in launches]
    # Of two processes that want the same the second waits, and finds it done.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = {file: launch for file, launch in zip(files, launches, strict=True) if not file.exists()}
        deaths = _compile_all(missing, progress)
    rows = []
    for launch, file in zip(launches, files, strict=True):
        row = deaths.get(file) or Figures(**json.loads(file.read_text()))
        rows.append(dataclasses.replace(row, programs=prod(launch.grid)))
    return rows


def _compile_all(missing: dict[Path, Launch], progress: Callable[[int, int], None]) -> dict[Path, Figures]:
    """Write the figures of launches to files. Returns those of launches that took their process down."""
    fork = multiprocessing.get_context("fork")  # Launches hold kernels and meta tensors, which cannot be pickled.
    waiting, running, deaths = list(missing), {}, {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            file = waiting.pop(0)
            said = tempfile.TemporaryFile("w+")
            process = fork.Process(target=_compile_to_file, args=(missing[file], file, said))
            process.start()
            running[process.sentinel] = process, file, said
        for sentinel in wait(running):
            process, file, said = running.pop(sentinel)
            process.join()
            if process.exitcode < 0:
                message = f"the compiler ended by {signal.Signals(-process.exitcode).name}{_errors(said)}"
                deaths[file] = _figures(missing[file], error=message)
            elif process.exitcode:
                raise RuntimeError(_said(said))
            said.close()
            progress(len(missing) - len(waiting) - len(running), len(missing))
    return deaths


def _compile_to_file(launch: Launch, file: Path, said) -> None:
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    row = _compile(launch, said)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
        json.dump(asdict(row), new)
    os.replace(new.name, file)


def _compile(launch: Launch, said) -> Figures:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options, signature, constants, attributes = launch.compilation
    source = ASTSource(launch.kernel, signature, constants, attributes)
    try:
        built = triton.compile(source, target=GPUTarget("cuda", launch.part, 32), options=vars(options))
    except Exception as error:  # whatever the compiler raises is what is to be reported
        return _figures(launch, error=f"{type(error).__name__}: {error}{_errors(said)}")
    code, ttir = _disassembled(built.asm["cubin"]), built.asm["ttir"]
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", code).groups())
    return _figures(
        launch,
        num_warps=built.metadata.num_warps,
        num_stages=max(map(int, _LOOP_STAGES.findall(ttir)), default=options.num_stages),
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        tensor_memory=getattr(built.metadata, "tmem_size", None) or 0,
        instructions=_instructions(code),
        dots=_dots(ttir),
        narrow_rows=narrow_rows(ttir),
        downward_loops=downward_loops(ttir),
    )


def _figures(launch: Launch, **more: object) -> Figures:
    options = launch.compilation[0]
    common = {"num_warps": options.num_warps, "num_stages": options.num_stages, "programs": prod(launch.grid)}
    constants = configuration(launch.kernel, *launch.args, **launch.kwargs)
    return Figures(kernel=launch.kernel.__name__, part=launch.part, configuration=constants, **(common | more))


def _said(said) -> str:
    said.seek(0)
    return said.read()


def _errors(said) -> str:
    """The errors among what the compiler printed, after which it prints the whole program."""
    return "".join(f"\n{line}" for line in _said(said).splitlines() if re.search(r"\berror: |\bLLVM ERROR", line))


def _disassembled(cubin: bytes) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(code: str) -> dict[str, int]:
    counts = Counter({name: len(re.findall(pattern, code)) for name, pattern in _INSTRUCTIONS.items()})
    for kind, modifiers in _GLOBAL_ACCESS.findall(code):
        width = next((int(m) for m in modifiers.split(".") if m in ("64", "128", "256")), 32)
        width = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}.get(modifiers.rsplit(".", 1)[-1], width)
        counts[f"{kind}.{width}"] += 1
    return dict(+counts)


def _dots(ttir: str) -> dict[str, int]:
    return dict(Counter(re.search(r"\d+", dtype)[0] for dtype in _DOT.findall(ttir)))


def narrow_rows(ttir: str) -> list[str]:
    """The loads and stores of tiles (tensors of two dimensions or more) in `ttir` without any 64-bit offset.

    An address is a base and offsets added to it one after the other: a 64-bit row offset added to the base, and offsets
    within the tile of 32 bits, do as well as 64-bit offsets throughout.
    """
    narrow = []
    for line, definitions in _defined(ttir):
        access = re.search(r"tt\.(?:load|store) (%[\w#]+).*?: tensor<(?:\d+x){2,}!tt\.ptr", line)
        if access and not _wide(access[1], definitions):
            narrow.append(line.strip())
    return narrow


def _wide(pointer: str, definitions: dict[str, str]) -> bool:
    while pointer in definitions:
        definition = definitions[pointer]
        if re.search(r"tt\.addptr .*, (?:i64|tensor<(?:\d+x)+i64>)", definition):
            return True
        step = re.match(r"tt\.(?:addptr|splat|broadcast|expand_dims|bitcast) (%[\w#]+)", definition)
        if step is None:
            return False
        pointer = step[1]
    return False


def downward_loops(ttir: str) -> list[str]:
    """The loops in `ttir` whose step is no positive constant, number of programs or argument of the kernel.

    MLIR's loops count upwards only. Triton turns a loop round whose step is a negative constant; with any other
    negative step the compiled loop ends before it begins.
    """
    downward = []
    for line, definitions in _defined(ttir):
        loop = re.search(r"scf\.for .* step (%[\w#-]+)", line)
        if loop and not _positive(loop[1], ttir, definitions):
            downward.append(line.strip())
    return downward


def _positive(value: str, ttir: str, definitions: dict[str, str]) -> bool:
    while (wider := re.match(r"arith\.extsi (%[\w#-]+)", definitions.get(value, ""))) is not None:
        value = wider[1]
    if value in definitions:
        return re.match(r"arith\.constant [1-9]|tt\.get_num_programs", definitions[value]) is not None
    return re.search(rf"tt\.func .*{re.escape(value)}: ", ttir) is not None


def _defined(ttir: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each line, and what the names on it stand for: a name may be defined again in another branch."""
    definitions = {}
    for line in ttir.splitlines():
        yield line, definitions
        if (definition := re.match(r"\s*(%[\w#-]+) = (.*)$", line)) is not None:
            definitions[definition[1]] = definition[2]


if __name__ == "__main__":
    _worker()
