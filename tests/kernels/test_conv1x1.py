"""1x1 convolutions: Triton's kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from fastres import cases, static_checks

CASES = {case.name: case for case in cases.BY_FAMILY["conv1x1"]}
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SHAPES = [(2, 9, 8, 24, 40), (1, 1, 1, 16, 8), (3, 7, 5, 3, 33), (1, 13, 11, 80, 64), (2, 6, 7, 72, 128)]


def sizes(shape):
    return dict(zip("nhwck", shape, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_computes_what_the_reference_defines(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, sizes(shape))


@pytest.mark.parametrize("wanted", static_checks.requests("conv1x1"), ids=str)
def test_every_configuration_compiles_and_computes_what_the_reference_defines(wanted, check_configuration):
    check_configuration("conv1x1", wanted)
