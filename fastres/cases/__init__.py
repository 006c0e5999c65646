"""One table of cases for every kernel: what `fastres verify` runs, tests compare and `static_checks` compiles.

A family's cases are in the module of its stem.
"""

from __future__ import annotations

from . import batch_norm, conv1x1, conv2d, conv3x3, expand, gram, projection, stem
from ._common import Case, Maker, copied, exact_inputs

__all__ = ["BY_FAMILY", "BY_NAME", "Case", "Maker", "copied", "exact_inputs"]

BY_FAMILY: dict[str, list[Case]] = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (batch_norm, conv1x1, conv2d, conv3x3, gram, expand, stem, projection)
}

BY_NAME: dict[str, Case] = {case.name: case for cases in BY_FAMILY.values() for case in cases}
