"""Measured seconds of single kernel calls, by GPU: one table, `<gpu>.json`, for each GPU that was measured.

A table is an object with "gpu", the name that `torch.cuda.get_device_name` gives, "conditions", whatever describes the
measurement (versions, date, source), and "seconds": for each call, by its label (`fastres.cost.seconds.Call.label`),
the median seconds by namespace of `fastres.kernels`:

    {"gpu": "NVIDIA H200", "conditions": {...}, "seconds": {"conv1x1 ...": {"triton": 1.2e-4, "library": 1.5e-4}}}

`benchmarks/tune.py` writes them. No table is shipped yet: nothing was measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from pathlib import Path

import torch

from fastres.files import write_text

FOLDER = Path(__file__).parent

VERSIONS = ("torch", "triton", "cuDNN", "driver", "commit")
"""Of a table's conditions, those that all of its calls have in common."""


def seconds(device: torch.device, label: str) -> dict[str, float] | None:
    """By namespace, the seconds that a call was measured to take on this GPU; None where it was not."""
    if device.type != "cuda":
        return None
    return table(torch.cuda.get_device_name(device)).get(label)


@functools.cache
def table(gpu: str) -> dict[str, dict[str, float]]:
    """The seconds of a GPU's table by call, empty where there is no table for it. ValueError for a damaged one."""
    file = FOLDER / _file_name(gpu)
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())["seconds"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a table of measured seconds ({error!r}): install fastres again") from error


def write(gpu: str, conditions: dict[str, str], seconds: dict[str, dict[str, float]], folder: Path = FOLDER) -> Path:
    """Write calls into a GPU's table; returns the file. Those that it has already stay, as far as they are not measured
    anew, where the versions in its conditions (`VERSIONS`) are these; else, or where it is damaged, it starts anew.
    """
    file = folder / _file_name(gpu)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        old = json.loads(file.read_text())
        if all(old["conditions"].get(name) == conditions.get(name) for name in VERSIONS):
            seconds = old["seconds"] | seconds
    write_text(file, json.dumps({"gpu": gpu, "conditions": conditions, "seconds": seconds}, indent=1) + "\n")
    table.cache_clear()
    return file


def _file_name(gpu: str) -> str:
    return f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
