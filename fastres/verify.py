"""`python -m fastres verify`: every kernel and every unit that can run on this machine, against exact results.

Each row is one three-way comparison (`fastres.numerics`): our results, those of stock PyTorch in the same dtype, and
those of the reference kernels or of stock modules in float64, from the same inputs. Inputs are drawn from a few seeds,
whose errors count as one vector: the error of one small tensor is as much chance as arithmetic, and the order in which
a CPU adds, which no two makes of them share, would decide.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from . import backends, cases
from .numerics import ThreeWay, three_way

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
SEEDS = 4

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One check. name: the case or the unit. backend: the namespace of the kernels, or "auto" for a unit.

    device: the type of the one that it ran on.
    results: what was compared, by name; empty where the check itself failed, for the reason in `error`.
    """

    name: str
    backend: str
    device: str
    dtype: torch.dtype
    results: dict[str, ThreeWay]
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and all(result.ok for result in self.results.values())

    @property
    def share(self) -> float:
        """The largest error as a share of what is allowed; above 1, and for NaN, the check fails."""
        return max(float("inf") if math.isnan(result.error) else result.share for result in self.results.values())


def main(arguments=None) -> int:
    """Prints the table. Returns the exit code: 1 when a row fails. The command has no `arguments`."""
    from .train.console import print_table

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rows = run(device)
    dtypes = DTYPES[device.type]
    for title, of_units in (("Kernels", False), ("Units", True)):
        columns = ["check", "backend", *map(_dtype_name, dtypes), "result"]
        cells = _cells([row for row in rows if (row.backend == "auto") == of_units], device.type, dtypes)
        print_table(f"{title} on {device}: the largest error, in percent of what is allowed", columns, cells)
    for name, reason in backends.available().items():
        if reason is not None:
            print(f"not checked: backend {name}: {reason}")
    extension = backends.load("projection")
    if device.type == "cuda" and extension.available() is None and extension.cuda_available() is not None:
        print(f"not checked: the CUDA kernels of backend projection: {extension.cuda_available()}")
    failed = [row for row in rows if not row.ok]
    for row in failed:
        for what in [row.error] if row.error else [f"{n}: {r}" for n, r in row.results.items() if not r.ok]:
            print(f"FAILED {row.name}, {row.backend}, {row.device}, {_dtype_name(row.dtype)}: {what}")
    print(f"{len(rows) - len(failed)} of {len(rows)} checks passed")
    return 1 if failed else 0


def run(device: torch.device) -> list[Row]:
    """All checks that can run, on `device` or, for kernels that only a CPU has, on the CPU. TF32 is off meanwhile."""
    with _without_tf32():
        return [*_kernel_rows(device), *_unit_rows(device)]


def _kernel_rows(device: torch.device) -> Iterator[Row]:
    reference = backends.load("reference")
    for case in cases.BY_NAME.values():
        for backend, reason in backends.available().items():
            if reason is not None:
                continue
            k = SimpleNamespace(
                **{name: getattr(backends.load(backend), name, getattr(reference, name)) for name in reference.__all__}
            )
            for dtype in DTYPES[device.type]:
                where = _place(backend, case.kernels, dtype, device)
                if where is None:
                    continue

                def run(seed, case=case, k=k, dtype=dtype, where=where) -> tuple[Named, Named, Named]:
                    t = case.make(cases.Maker(dtype, where, seed), **case.sizes)
                    exact = case.run(reference, cases.exact_inputs(t))
                    return case.run(k, cases.copied(t)), case.stock(cases.copied(t)), exact

                yield _row(case.name, backend, where, dtype, run)


def _place(backend: str, kernels: Sequence[str], dtype: torch.dtype, device: torch.device) -> torch.device | None:
    """Where a namespace has some of the kernels: on `device`, on a CPU, or nowhere."""
    for place in (device, torch.device("cpu")):
        if any(backends.offers(backend, kernel, dtype, place.type) for kernel in kernels):
            return place
    return None


def _units() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """A factory and the shape of an input for every kind of fused module."""
    from .nn import BasicBlock, Bottleneck, ConvBNReLU2d, Projection, Stem, make_shortcut

    def block(cls, in_channels, planes, stride=1, option="B"):
        out_channels = planes * cls.expansion
        return lambda: cls(in_channels, planes, stride, make_shortcut(option, in_channels, out_channels, stride))

    return {
        "BasicBlock": (block(BasicBlock, 24, 24), (4, 24, 9, 8)),
        "BasicBlock, zero-padding": (block(BasicBlock, 24, 40, 2, "A"), (4, 24, 9, 8)),
        "BasicBlock, projection": (block(BasicBlock, 24, 40, 2), (4, 24, 9, 8)),
        "Bottleneck": (block(Bottleneck, 64, 16), (4, 64, 9, 8)),
        "Bottleneck, zero-padding": (block(Bottleneck, 24, 16, 2, "A"), (4, 24, 9, 8)),
        "Bottleneck, projection": (block(Bottleneck, 24, 16), (4, 24, 9, 8)),
        "Bottleneck, projection, stride 2": (block(Bottleneck, 24, 16, 2), (4, 24, 9, 8)),
        "ConvBNReLU2d": (lambda: ConvBNReLU2d(24, 40), (4, 24, 9, 8)),
        "ConvBNReLU2d 1x1, stride 2": (lambda: ConvBNReLU2d(24, 40, 1, 2), (4, 24, 9, 8)),
        "Projection, stride 2": (lambda: Projection(24, 40, 2), (4, 24, 9, 8)),
        "Stem": (lambda: Stem(3, 24), (4, 3, 33, 30)),
    }


def _unit_rows(device: torch.device) -> Iterator[Row]:
    for name, (factory, shape) in _units().items():
        for mode in ("training", "eval"):
            for dtype in DTYPES[device.type]:

                def run(seed, factory=factory, shape=shape, mode=mode, dtype=dtype) -> tuple[Named, Named, Named]:
                    fused, x, g = _unit(factory, shape, mode == "training", dtype, seed)
                    exact = _run_module(_stock(fused).double(), x.double(), g.double())
                    fused, x, g = (t.to(device) for t in (fused, x, g))
                    return _run_fused(fused, x, g), _run_module(_stock(fused), x, g), exact

                yield _row(f"{name}, {mode}", "auto", device, dtype, run)


def _unit(factory, shape, training: bool, dtype: torch.dtype, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A module whose batch norms are away from their initial values, an input, and a gradient of its output.

    The convolutions are of `dtype`, the batch norms of float32, as stock modules train in low precision.
    """
    f = cases.Maker(dtype, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory().train(training)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            for tensor, low, high in ((child.weight, 0.5, 1.5), (child.bias, -0.5, 0.5)):
                tensor.data.copy_(f.vector(channels, low, high))
            child.running_mean.copy_(f.vector(channels, -0.5, 0.5))
            child.running_var.copy_(f.vector(channels))
        elif isinstance(child, nn.Conv2d):
            child.to(dtype)
    x = f.activation(*shape).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        g = f.activation(*copy.deepcopy(module)(x).shape)
    return module, x, g


def _stock(fused: nn.Module) -> nn.Module:
    from .conversion import revert

    return revert(copy.deepcopy(fused))


def _run_fused(module: nn.Module, x: Tensor, g: Tensor) -> Named:
    from .nn.guard import call_reason

    reason = call_reason(x) or module.fused_reason()
    if reason is not None:
        raise RuntimeError(f"does not run fused: {reason}")
    return _run_module(copy.deepcopy(module), x, g)


def _run_module(module: nn.Module, x: Tensor, g: Tensor) -> Named:
    """The output, every gradient and every buffer afterwards."""
    x = x.clone().requires_grad_()
    out = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [x, *parameters], g)
    gradients = zip(["x", *names], gradients, strict=True)
    results = {"output": out.detach()} | {f"gradient of {name}": gradient for name, gradient in gradients}
    return results | dict(module.named_buffers())


def _row(
    name: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    run: Callable[[int], tuple[Named, Named, Named]],
) -> Row:
    """The check of what `run(seed)` gives: our results, stock's and the exact ones."""
    try:
        ours, stock, exact = zip(*map(run, range(SEEDS)), strict=True)
        if not ours[0].keys() == stock[0].keys() == exact[0].keys():
            raise RuntimeError(f"results differ: {sorted(ours[0])}, stock {sorted(stock[0])}, exact {sorted(exact[0])}")
        results = {}
        for result in exact[0]:
            made, by_stock, right = (torch.cat([t[result].flatten() for t in runs]) for runs in (ours, stock, exact))
            results[result] = three_way(made, by_stock, right.double(), dtype)
    except Exception as error:  # a check that cannot run is a failed check, and the others still run
        return Row(name, backend, device.type, dtype, {}, f"{type(error).__name__}: {error}")
    return Row(name, backend, device.type, dtype, results)


def _cells(rows: list[Row], device: str, dtypes: Sequence[torch.dtype]) -> list[list[str]]:
    """A line for each check of a backend; what did not run on `device` is told apart."""
    checks: dict[tuple[str, str], dict[torch.dtype, Row]] = {}
    for row in rows:
        backend = row.backend if row.device == device else f"{row.backend} ({row.device})"
        checks.setdefault((row.name, backend), {})[row.dtype] = row
    cells = []
    for (name, backend), found in checks.items():
        shares = ["" if dtype not in found else _share(found[dtype]) for dtype in dtypes]
        cells.append([name, backend, *shares, "ok" if all(row.ok for row in found.values()) else "FAILED"])
    return cells


def _share(row: Row) -> str:
    return "-" if row.error else f"{100 * row.share:.0f} %"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _without_tf32():
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
