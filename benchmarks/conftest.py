"""`pytest benchmarks/`: measuring on this machine's GPU, or small on its CPU.

Each test times the variants of one piece of work against each other (`fastres.measure`), after a correctness gate, and
adds rows to `results.json` in the folder `--out`; at the end that folder gets a report. Several calls into one folder
add up. pytest-benchmark's own table shows fastres' variants by the host's clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from fastres.measure import modules, report
from fastres.measure.experiment import Experiment
from fastres.measure.results import Results
from fastres.measure.session import Session

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCHES = {
    "cuda": {"kernels": 256, "units": 256, "models": 256},
    "cpu": {"kernels": 2, "units": 4, "models": 8},
}
ROUNDS = 3

SESSION = pytest.StashKey[Session]()
MEASURED = pytest.StashKey[tuple[Results, Path]]()


def pytest_addoption(parser):
    group = parser.getgroup("fastres benchmarks")
    group.addoption("--level", choices=("core", "full"), default="core", help="the important shapes (default), or all")
    group.addoption("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    group.addoption(
        "--dtype", choices=DTYPES, action="append", help="default: bf16 on a GPU, fp32 on a CPU; can be repeated"
    )
    group.addoption("--batch", type=int, action="append", metavar="N", help="images; can be repeated")
    group.addoption("--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="default: runs/benchmarks")
    group.addoption(
        "--time-budget", type=float, default=math.inf, metavar="SECONDS", help="what does not fit is skipped"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "core(*devices): part of --level core on these kinds of device")
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks need the machine to themselves: leave -n out")
    if any(batch < 1 for batch in config.getoption("batch") or []):
        raise pytest.UsageError("--batch must be at least 1")
    device = _device(config.getoption("device"))
    if device.type == "cpu" and "fp16" in _dtypes(config, device):
        raise pytest.UsageError("--dtype fp16 needs a GPU; give bf16 or fp32")
    dtypes = [DTYPES[name] for name in _dtypes(config, device)]
    config.stash[SESSION] = Session(config.getoption("out"), device, dtypes, config.getoption("time_budget"))


def pytest_generate_tests(metafunc):
    device = metafunc.config.stash[SESSION].device
    if "dtype" in metafunc.fixturenames:
        names = _dtypes(metafunc.config, device)
        metafunc.parametrize("dtype", [DTYPES[name] for name in names], ids=names)
    if "batch" in metafunc.fixturenames:
        default = BATCHES[device.type][Path(metafunc.module.__file__).parent.name]
        metafunc.parametrize("batch", metafunc.config.getoption("batch") or [default], ids="batch{}".format)


def pytest_collection_modifyitems(config, items):
    if config.getoption("level") == "full":
        return
    kind = config.stash[SESSION].device.type
    core = [item for item in items if any(kind in mark.args for mark in item.iter_markers("core"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in core])
    items[:] = core


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return request.config.stash[SESSION].device


@pytest.fixture
def modes(request, device):
    """`modes(*core)`: of torch.compile at this level; those given at level core, all at level full."""

    def choose(*core: str) -> tuple[str, ...]:
        wanted = core if request.config.getoption("level") == "core" else modules.COMPILE_MODES
        reason = modules.cannot_compile(device) if wanted else None
        session, what = request.config.stash[SESSION], f"{request.node.nodeid}, torch.compile"
        if reason is None:
            session.unskip(what)
            return wanted
        session.skip(what, reason)
        return ()

    return choose


@pytest.fixture
def measure(request, benchmark, device):
    """`measure(experiments)`: run them, write their rows, and fail where fastres has no speed or a result is wrong."""
    session, name = request.config.stash[SESSION], request.node.nodeid
    if session.left() <= 0:
        session.skip(name, "no time left")
        pytest.skip("no time left")
    session.unskip(name)

    def run(experiments: Iterable[Experiment]) -> None:
        ran, failures = 0, []
        for experiment in experiments:
            done = session.run(experiment)
            if done is None:
                continue
            ran += 1
            failures += [f"{experiment.title}, {variant}: {why}" for variant, why in done.failures.items()]
            if ran == 1:
                _record(benchmark, experiment, done.calls, device)
            del done
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        if not ran:
            pytest.skip("not enough time left")

    return run


def _record(benchmark, experiment: Experiment, calls, device: torch.device) -> None:
    """Hand ours to pytest-benchmark, which can neither interleave nor take times on a device."""
    ours = next((name for name in calls if name.startswith("fastres")), None)
    if ours is None:
        return

    def call():
        calls[ours]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = experiment.group
    benchmark.extra_info["variant"] = ours
    benchmark.pedantic(call, rounds=ROUNDS)


def pytest_sessionfinish(session):
    measuring = session.config.stash.get(SESSION, None)
    measured = measuring and measuring.finish()
    if measured:
        session.config.stash[MEASURED] = measured, report.write(measuring.folder, measured)


def pytest_unconfigure(config):
    """Prints the table, after everything that pytest prints."""
    if MEASURED not in config.stash:
        return
    measured, path = config.stash[MEASURED]
    report.show(measured)
    for note in config.stash[SESSION].notes:
        print(note)
    print(f"report: {path}")


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device {name} is not known; give cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: PyTorch sees no GPU here; give --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise pytest.UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", device.index or 0)


def _dtypes(config, device: torch.device) -> list[str]:
    return config.getoption("dtype") or ["bf16" if device.type == "cuda" else "fp32"]
