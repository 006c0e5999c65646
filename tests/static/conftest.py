"""Small kernels that are planted for the checks to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def planted(all_parts):
    """`planted(name, part)`: the figures of a launch of `planted.py`."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastres.static_checks import Figures

    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("planted.py"), "80", "90", *(["100"] if all_parts else [])],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {(name, part): Figures(**row) for name, part, row in json.loads(done.stdout)}

    def get(name: str, part: int) -> Figures:
        if part == 100 and not all_parts:
            pytest.skip("sm_100 is compiled for with --all-parts only")
        return rows[name, part]

    return get
