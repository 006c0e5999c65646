"""`python -m fastres inspect`: every Triton kernel in every configuration, compiled for GPUs that are not there.

`fastres.static_checks` compiles and counts; here the figures are judged. A launch fails where it

- does not compile, spills registers, or keeps a stack frame;
- asks for more shared or tensor memory than its part has;
- multiplies 16-bit matrices by anything but the part's own matrix instruction, which is several times faster: HGMMA on
  sm_90, tcgen05 on sm_100;
- forms the addresses of a tile's rows in 32 bits, and so would read elsewhere in a tensor of 2**31 elements.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from . import cases, info, static_checks
from .parts import PARTS as GPUS
from .static_checks import LIMITS, Figures, Request
from .train.errors import UserError

Compiled = dict[tuple[Request, int], list[Figures]]
"""What `static_checks.figures` gives."""


@dataclass(frozen=True)
class KnownBug:
    """A failure that is the compiler's and not the kernel's.

    kernel: name of the device function. part: compute capability. triton: how the versions that have the bug begin
    ("3.6."). launch: regular expression that finds the launches, in "CASE; DTYPE; SIZES; CONFIGURATION". problem: one
    that finds the problem. reason: what is wrong in the compiler, for those who read the table.
    """

    kernel: str
    part: int
    triton: str
    launch: str
    problem: str
    reason: str

    def concerns(self, request: Request, figures: Figures) -> bool:
        """Whether a launch is among those with the bug."""
        return (
            (figures.kernel, figures.part) == (self.kernel, self.part)
            and info.version("triton").startswith(self.triton)
            and re.search(self.launch, f"{request}; {_text(figures.configuration)}") is not None
        )


KNOWN_COMPILER_BUGS: tuple[KnownBug, ...] = ()
"""What may fail. An entry that no failure answers to any more is itself a failure: then the compiler or the kernel has
changed, and the entry goes."""

_MATRIX_INSTRUCTIONS = {90: "HGMMA", 100: "UTCMMA"}
_NAMES = {"UTCMMA": "tcgen05"}


def problems(figures: Figures) -> list[str]:
    """What is wrong with what a launch compiled to."""
    if figures.error is not None:
        return [f"does not compile: {figures.error}"]
    found = []
    if figures.spills:
        found.append(f"{figures.spills} spilling instructions")
    if figures.stack:
        found.append(f"a stack frame of {figures.stack} bytes")
    if figures.shared > LIMITS[figures.part].shared:
        found.append(f"{figures.shared} bytes of shared memory, at most {LIMITS[figures.part].shared} are allowed")
    if figures.tensor_memory > static_checks.TENSOR_MEMORY_OF_SM:
        found.append(f"{figures.tensor_memory} columns of tensor memory, an SM has {static_checks.TENSOR_MEMORY_OF_SM}")
    best = _MATRIX_INSTRUCTIONS.get(figures.part)
    if best and "16" in figures.dots and (figures.count("HMMA") or not figures.count(best)):
        found.append(f"16-bit matrices multiplied by {figures.count('HMMA')} HMMA, not by {_NAMES.get(best, best)}")
    if figures.narrow_rows:
        found.append(f"{len(figures.narrow_rows)} accesses with rows addressed in 32 bits: {figures.narrow_rows[0]}")
    if figures.downward_loops:
        loops = figures.downward_loops
        found.append(f"{len(loops)} loops that may never run once compiled: {loops[0]}")
    return found


def judge(
    request: Request, figures: Figures, bugs: tuple[KnownBug, ...] = KNOWN_COMPILER_BUGS
) -> tuple[list[str], list[str]]:
    """The problems of a launch that fail it, and those that `bugs` know."""
    patterns = [bug.problem for bug in bugs if bug.concerns(request, figures)]
    failures, known = [], []
    for problem in problems(figures):
        (known if any(re.search(pattern, problem) for pattern in patterns) else failures).append(problem)
    return failures, known


def outdated(compiled: Compiled, bugs: tuple[KnownBug, ...] = KNOWN_COMPILER_BUGS) -> list[str]:
    """The entries of `bugs`, for Triton's installed version and the parts compiled, that no failure answers to."""
    parts = {part for _, part in compiled}
    launches = [(request, row) for (request, _), rows in compiled.items() for row in rows]
    told = []
    for bug in bugs:
        if bug.part not in parts or not info.version("triton").startswith(bug.triton):
            continue
        concerned = [row for request, row in launches if bug.concerns(request, row)]
        if not concerned:
            told.append(f"{bug} matches no launch: take it out of KNOWN_COMPILER_BUGS")
        elif not any(re.search(bug.problem, problem) for row in concerned for problem in problems(row)):
            told.append(f"{bug} starts to pass: take it out of KNOWN_COMPILER_BUGS")
    return told


@dataclass(frozen=True)
class Inspected:
    """A launch of a case on a part: its figures, the problems that fail it, and those of known compiler bugs."""

    request: Request
    figures: Figures
    failures: list[str]
    known: list[str]

    @property
    def verdict(self) -> str:
        return "FAILED" if self.failures else "known bug" if self.known else "ok"


def inspect(compiled: Compiled, bugs: tuple[KnownBug, ...] = KNOWN_COMPILER_BUGS) -> list[Inspected]:
    """Every launch, judged."""
    launches = [(request, row) for (request, _), rows in compiled.items() for row in rows]
    return [Inspected(request, row, *judge(request, row, bugs)) for request, row in launches]


def main(arguments) -> int:
    """Prints the tables, or JSON. Returns the exit code: 1 when a launch fails or a known bug is outdated."""
    from .train.console import counter

    if importlib.util.find_spec("triton") is None:
        raise UserError("triton is not installed; pip install 'triton>=3.6' (no GPU is needed)")
    parts = _parts(arguments.part)
    wanted = _wanted(arguments.family, arguments.kernel)
    with counter("compiling") as progress:
        compiled = static_checks.figures(wanted, parts, progress)
    kernels = {row.kernel for rows in compiled.values() for row in rows}
    everything = arguments.family is None and arguments.kernel is None
    bugs = tuple(bug for bug in KNOWN_COMPILER_BUGS if everything or bug.kernel in kernels)
    launches, stale = inspect(compiled, bugs), outdated(compiled, bugs)
    if arguments.json:
        plain = [_plain(launch) for launch in launches]
        print(json.dumps({"triton": info.version("triton"), "launches": plain, "outdated": stale}))
    else:
        _show(launches, stale)
    return 1 if stale or any(launch.failures for launch in launches) else 0


def _parts(names: list[str]) -> list[int]:
    known = {str(part): part for part in LIMITS} | {f"sm_{part}": part for part in LIMITS}
    known |= {name: gpu.capability for name, gpu in GPUS.items()}
    for name in names:
        if name.lower() not in known:
            choices = ", ".join([*map(str, LIMITS), *GPUS])
            raise UserError(f"argument --part: {name!r} is not known; use one of {choices}")
    return list(dict.fromkeys(known[name.lower()] for name in names))


def _wanted(family: str | None, kernel: str | None) -> list[Request]:
    wanted = {name: static_checks.requests(name, everything=True) for name in cases.BY_FAMILY}
    wanted = {name: requests for name, requests in wanted.items() if requests}
    if family is not None:
        if family not in wanted:
            raise UserError(f"argument --family: {family!r} has no Triton kernels; use one of {', '.join(wanted)}")
        wanted = {family: wanted[family]}
    every = [request for requests in wanted.values() for request in requests]
    if kernel is None:
        return every
    chosen = [request for request in every if kernel in cases.BY_NAME[request.case].kernels]
    if not chosen:
        names = sorted({name for request in every for name in cases.BY_NAME[request.case].kernels})
        raise UserError(f"argument --kernel: {kernel!r} is in no case that is compiled; use one of {', '.join(names)}")
    return chosen


def _show(launches: list[Inspected], stale: list[str]) -> None:
    from .train.console import print_table

    for kernel in sorted({launch.figures.kernel for launch in launches}):
        headings, *rows = _table([launch for launch in launches if launch.figures.kernel == kernel])
        print_table(f"{_name(kernel)}, by triton {info.version('triton')}", headings, rows)
    for launch in launches:
        where = f"{_name(launch.figures.kernel)}, sm_{launch.figures.part}, {launch.request}"
        for problem in launch.failures:
            print(f"FAILED {where}: {problem}")
        for problem in launch.known:
            print(f"known compiler bug {where}: {problem}")
    for entry in stale:
        print(f"FAILED {entry}")
    clean = sum(launch.verdict == "ok" for launch in launches)
    print(f"{clean} of {len(launches)} launches of {len({launch.request.case for launch in launches})} cases are clean")


def _table(launches: list[Inspected]) -> list[list[str]]:
    """Headings, and for one kernel a line for each configuration on each part, over all cases and dtypes it serves."""
    groups: dict[tuple, list[Inspected]] = {}
    for launch in launches:
        row = launch.figures
        sizes = _numbers(row.configuration)
        groups.setdefault((row.part, *sizes.values(), row.num_warps, row.num_stages), []).append(launch)
    lines = [_line(groups[key]) for key in sorted(groups)]
    # Instructions that it does not use have no column.
    names = [name for name in lines[0] if any(line[name] for line in lines)]
    return [names, *([line[name] or "-" for name in names] for line in lines)]


def _line(launches: list[Inspected]) -> dict[str, str]:
    """Of launches in the same configuration, by heading."""
    rows = [launch.figures for launch in launches]
    in_registers = "HGMMA with A in registers"

    def span(values: Iterable[int], unit: str = "") -> str:
        """The smallest and the largest, once where they are equal, and nothing where there are none."""
        ends = sorted(values)
        return "-".join(dict.fromkeys(map(str, (ends[0], ends[-1])))) + unit if any(ends) else ""

    def count(name: str) -> str:
        return span(row.count(name) for row in rows)

    verdicts = {launch.verdict for launch in launches}
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return {
        "part": f"sm_{rows[0].part}",
        "config": _text(_numbers(rows[0].configuration)),
        "dtypes": " ".join(dict.fromkeys(short[launch.request.dtype] for launch in launches)),
        "cases": str(len({launch.request.case for launch in launches})),
        "warps": str(rows[0].num_warps),
        "stages": str(rows[0].num_stages),
        "regs": span(row.registers for row in rows),
        "spills": span(row.spills for row in rows) or "0",
        "stack": span(row.stack for row in rows) or "0",
        "shared": span((-(-row.shared // 1024) for row in rows), " K"),
        "per SM": span(row.resident for row in rows if row.error is None),
        "HGMMA SS": span(row.count("HGMMA") - row.count(in_registers) for row in rows),
        "HGMMA RS": count(in_registers),
        "tcgen05": count("UTCMMA"),
        "HMMA": count("HMMA"),
        "TMA loads": count("UTMALDG"),
        "TMA stores": count("UTMASTG"),
        "cp.async": span(sum(n for kind, n in row.instructions.items() if kind.startswith("LDGSTS")) for row in rows),
        "access": span((width // 8 for row in rows for width in row.widths), " B"),
        "verdict": next(verdict for verdict in ("FAILED", "known bug", "ok") if verdict in verdicts),
    }


def _plain(launch: Inspected) -> dict:
    """A launch for JSON: what it was of, the figures, what follows from them, and the judgement."""
    figures = launch.figures
    request = {"case": launch.request.case, "dtype": launch.request.dtype, "sizes": dict(launch.request.sizes)}
    derived = {"spills": figures.spills, "resident": figures.resident, "widths": figures.widths}
    judgement = {"failures": launch.failures, "known": launch.known, "verdict": launch.verdict}
    return request | dataclasses.asdict(figures) | derived | judgement


def _name(kernel: str) -> str:
    return kernel.removeprefix("_").removesuffix("_kernel")


def _text(configuration: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in configuration.items())


def _numbers(configuration: dict[str, object]) -> dict[str, int]:
    """The numbers of a configuration but for the stages of its loops; its flags belong to the case."""
    return {name: value for name, value in configuration.items() if type(value) is int and name != "STAGES"}
