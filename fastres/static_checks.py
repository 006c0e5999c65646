"""Compile Triton kernels for GPUs that are not there, and read what decides whether they are fast.

A case of `fastres.cases` runs on the meta device, where tensors have shapes only; each launch that it makes is recorded
and compiled, as that launch would compile it, for one part (compute capability: 80, 90, 100). Registers, stack and
instructions come from the cubin, by cuobjdump inside the triton package; row addresses from Triton's own IR.

The work is done by a process of its own, without TRITON_INTERPRET. Results are kept under the user's cache folder, by a
hash of the kernel's source with all that it calls, its arguments and Triton's version.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch

from . import cases

PARTS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may use."""

_REGISTERS_OF_SM = 65536
_WARPS_OF_SM = 64
_SHARED_RESERVED = 1024
_FORMAT = 1  # of the cached results; counts what is read from a kernel

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
_POINTER_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Request:
    """A case of `fastres.cases` by name, the dtype of its activations ("bfloat16") and the sizes to make it with."""

    case: str
    dtype: str
    sizes: tuple[tuple[str, object], ...]  # hashable, so that a request can be a key

    def __str__(self) -> str:
        return f"{self.case}; {self.dtype}; {', '.join(f'{name} {size}' for name, size in self.sizes)}"

    @staticmethod
    def of(case: str, dtype: torch.dtype, **sizes: object) -> Request:
        return Request(case, str(dtype).removeprefix("torch."), tuple(sizes.items()))


@dataclass(frozen=True)
class Figures:
    """What one launch compiled to, for one part.

    programs: how many the launch starts. shared, stack: bytes. instructions: how many of each kind stand in the code
    (global accesses by their width in bits: "LDG.128", "STG.32"; LDGSTS is cp.async). narrow_rows: accesses to tiles
    whose row addresses are not formed in 64 bits. error: why it does not compile; the other figures are then 0.
    """

    kernel: str
    part: int
    num_warps: int
    num_stages: int
    programs: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    narrow_rows: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def spills(self) -> int:
        return self.instructions.get("spill", 0)

    @property
    def resident(self) -> int:
        """Programs that run on one SM at the same time, by registers, shared memory and warps."""
        registers = -(-self.registers // 8) * 8 * 32 * self.num_warps
        shared = SHARED_LIMIT[self.part] + _SHARED_RESERVED
        return min(
            _REGISTERS_OF_SM // max(1, registers),
            shared // (self.shared + _SHARED_RESERVED),
            _WARPS_OF_SM // self.num_warps,
        )


def requests(family: str) -> list[Request]:
    """What the cases of a family ask to be compiled."""
    return [Request.of(case.name, dtype, **sizes) for case in cases.BY_FAMILY[family] for dtype, sizes in case.static]


def figures(wanted: Iterable[Request], parts: Iterable[int] = PARTS) -> dict[tuple[Request, int], list[Figures]]:
    """The figures of every launch of each request on each part. Raises RuntimeError where the worker process fails."""
    jobs = [(request, part) for request in wanted for part in parts]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([(asdict(request), part) for request, part in jobs]),
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"compiling kernels failed:\n{done.stderr}")
    results = [[Figures(**row) for row in launches] for launches in json.loads(done.stdout)]
    return dict(zip(jobs, results, strict=True))


def _worker() -> None:
    """Serve `figures`: jobs come by stdin, figures go to stdout, both as JSON."""
    jobs = [(Request(**request), part) for request, part in json.load(sys.stdin)]
    made = [[(launch, part, _key(launch, part)) for launch in _launches(request, part)] for request, part in jobs]
    _cache_folder().mkdir(parents=True, exist_ok=True)
    # Of two processes that want the same the second waits, and finds it done. Threads suffice: most of the time goes to
    # the assembler and the disassembler, which are programs of their own.
    with open(_cache_folder() / "lock", "w") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        distinct = {key: (launch, part) for launches in made for launch, part, key in launches}
        compiling = {key: pool.submit(_figures_of_launch, *job, key) for key, job in distinct.items()}
        json.dump([[asdict(compiling[key].result()) for _, _, key in launches] for launches in made], sys.stdout)


@dataclass(frozen=True)
class _Launch:
    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, object]
    options: dict[str, object]


def _launches(request: Request, part: int) -> list[_Launch]:
    """Run a case on the meta device, catching the launches instead of making them."""
    from triton.runtime.jit import JITFunction

    from fastres.kernels import reference, triton
    from fastres.kernels.triton import _common

    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        arguments = {name: given.pop(name) for name in kernel.arg_names if name in given}
        launches.append(_Launch(kernel, grid, arguments, given))

    names = {name: getattr(triton if hasattr(triton, name) else reference, name) for name in reference.__all__}
    case = cases.BY_NAME[request.case]
    original, JITFunction.run = JITFunction.run, run
    _common.PART_WITHOUT_GPU = part
    try:
        inputs = case.make(cases.Maker(getattr(torch, request.dtype), "meta"), **dict(request.sizes))
        case.run(SimpleNamespace(**names), inputs)
    finally:
        JITFunction.run = original
    return launches


def _specialised(launch: _Launch) -> tuple[dict[str, str], dict[str, object], dict]:
    """Signature, constants and attributes of a launch, as Triton's launcher derives them from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTER_TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            raise TypeError(f"{launch.kernel.__name__}: {parameter.name} is a {type(value).__name__}")
    return signature, constants, attributes


def _key(launch: _Launch, part: int) -> str:
    """A hash of all that the figures of a launch depend on."""
    import triton

    facts = (
        _FORMAT,
        triton.__version__,
        part,
        launch.kernel.cache_key,
        _specialised(launch),
        launch.options,
        launch.grid,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _figures_of_launch(launch: _Launch, part: int, key: str) -> Figures:
    cached = _cache_folder() / f"{key}.json"
    if cached.exists():
        return Figures(**json.loads(cached.read_text()))
    result = _compiled(launch, part)
    with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False) as file:
        json.dump(asdict(result), file)
    os.replace(file.name, cached)
    return result


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres" / "static"


def _compiled(launch: _Launch, part: int) -> Figures:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialised(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "num_stages": 3} | launch.options
    common = {
        "kernel": launch.kernel.__name__,
        "part": part,
        "num_warps": options["num_warps"],
        "num_stages": options["num_stages"],
        "programs": prod(launch.grid),
    }
    try:
        built = triton.compile(source, target=GPUTarget("cuda", part, 32), options=options)
    except Exception as error:  # whatever the compiler raises is what is to be reported
        return Figures(**common, error=f"{type(error).__name__}: {error}")
    code = _disassembled(built.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", code).groups())
    return Figures(
        **common,
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        instructions=_instructions(code),
        narrow_rows=narrow_rows(built.asm["ttir"]),
    )


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
        width = next((int(m) for m in modifiers.split(".") if m in ("64", "128")), 32)
        width = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}.get(modifiers.rsplit(".", 1)[-1], width)
        counts[f"{kind}.{width}"] += 1
    return dict(+counts)


def narrow_rows(ttir: str) -> list[str]:
    """The loads and stores of tiles (tensors of two dimensions or more) in `ttir` without any 64-bit offset.

    An address is a base and offsets added to it one after the other: a 64-bit row offset added to the base, and offsets
    within the tile of 32 bits, do as well as 64-bit offsets throughout.
    """
    definitions = dict(re.findall(r"^\s*(%[\w#]+) = (.*)$", ttir, re.M))
    narrow = []
    for line in ttir.splitlines():
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


if __name__ == "__main__":
    _worker()
