"""How many programs a kernel is compiled to: training must not stop to compile because a batch has another size."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

KEYS = """
import json, torch
from fastres import cases, static_checks

def keys(case, sizes):
    request = static_checks.Request.of(case, torch.bfloat16, **sizes)
    return [launch.key for launch in static_checks._launches(request, 90)]

image = {
    "batch_norm": {"h": 14, "w": 14, "c": 256},
    "stem": {"h": 112, "w": 112, "c": 64},
    "conv1x1": {"h": 14, "w": 14, "c": 256, "k": 64},
    "conv3x3": {"h": 28, "w": 28, "c": 64, "k": 64},
    "expand": {"h": 14, "w": 14, "k": 64, "c": 256, "s": 128},
    "gram": {"h": 14, "w": 14, "k": 64, "c": 256},
}
print(json.dumps({
    case.name: [keys(case.name, {"n": n, **image[family]}) for n in (256, 143, 1)]
    for family in image for case in cases.BY_FAMILY[family] if case.static
}))
"""


def test_batches_of_every_size_run_the_same_programs():
    done = subprocess.run(
        [sys.executable, "-c", KEYS],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for case, (full, last, single) in json.loads(done.stdout).items():
        # A box of many images would be nearly empty with one of them.
        assert full and full == last and (full == single or case.startswith("conv3x3")), case
