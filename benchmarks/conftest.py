"""Measuring on the current device: `pytest benchmarks/`."""

from __future__ import annotations

import statistics

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def measure(benchmark, device):
    """`measure(call, moved)`: time a call that has to move `moved` bytes.

    On CUDA the times of the table include the launch and a synchronisation; `device_us` among the extra figures is the
    median between two events around the call.
    """

    def run(call, moved: int) -> None:
        seconds = None
        if device.type == "cuda":
            seconds = statistics.median(_seconds_by_events(call) for _ in range(50))
            benchmark(lambda: (call(), torch.cuda.synchronize()))
        else:
            benchmark(call)
        # With --benchmark-disable there is nothing to report.
        if seconds is None and benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
        if seconds is not None:
            benchmark.extra_info |= {"device_us": round(1e6 * seconds, 2), "GB/s": round(moved / seconds / 1e9, 2)}

    return run


def _seconds_by_events(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
