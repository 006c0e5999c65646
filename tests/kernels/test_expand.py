"""The expanding 1x1 conv of a bottleneck, both directions: Triton's kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from fastres import cases, static_checks

CASES = {case.name: case for case in cases.BY_FAMILY["expand"]}
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
ALONE = [name for name, case in CASES.items() if "gram" not in case.kernels and "gram_bwd" not in case.kernels]
SHAPES = [
    (2, 9, 8, 24, 96, 40),
    (1, 5, 1, 16, 8, 8),
    (3, 7, 5, 3, 33, 5),
    (1, 13, 11, 72, 136, 64),
    (2, 6, 7, 160, 80, 24),
]


def sizes(shape):
    return dict(zip("nhwkcs", shape, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_triton_computes_what_the_reference_defines(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, sizes(shape))


@pytest.mark.parametrize("wanted", static_checks.requests("expand"), ids=str)
def test_every_configuration_compiles_and_computes_what_the_reference_defines(wanted, check_configuration):
    check_configuration("expand", wanted)


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ALONE])
def test_both_directions_with_the_small_matrices_between(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, sizes(shape))
