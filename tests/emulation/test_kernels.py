"""The CUDA kernels, run on the CPU, against the reference kernels in float64."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import Case, forms_of

by_op = pytest.mark.parametrize(("op", "path"), kernel_cases.OPS, ids=map("-".join, kernel_cases.OPS))
# Each runs the same kernels with asynchronous copies landing, and threads and blocks running, in another order.
ORDERS = [
    {"landing": "early"},
    {"landing": "random", "seed": 1},
    {"shuffled": True, "seed": 2},
    {"landing": "random", "shuffled": True, "seed": 3},
]


@pytest.mark.parametrize("case", [case for op in kernel_cases.OPS for case in kernel_cases.definition(*op)], ids=str)
def test_definition(kernels, case):
    case.run(kernels)


@pytest.mark.parametrize("size", [(2, 9, 9, 200, 72, 2), (2, 23, 25, 40, 72, 1)], ids=str)
@by_op
def test_same_bits_in_every_order(kernels, op, path, size):
    for words in {forms_of(op, path)[0], forms_of(op, path)[-1]}:
        case = Case(op, size, torch.bfloat16, path, words)
        first = case.run(kernels)
        for order in ({}, *ORDERS):
            with kernels.options(**order):
                again = case.run(kernels)
            assert all(torch.equal(first[name], again[name]) for name in first), order


@pytest.mark.parametrize("case", [case for op in kernel_cases.OPS for case in kernel_cases.far(*op)], ids=str)
def test_offsets_beyond_32_bits(kernels, case):
    case.run(kernels)


@pytest.mark.parametrize("case", [case for op in kernel_cases.OPS for case in kernel_cases.aligned(*op)], ids=str)
def test_no_bank_conflicts_and_whole_sectors(kernels, case):
    kernel_cases.check_profile(kernels, case)


@pytest.mark.parametrize("path", ["portable", "hopper"])
@pytest.mark.parametrize("c", [64, 72, 512, 2048])
@pytest.mark.parametrize("pixels", [1, 512, 50_176, 3_211_264])
def test_splits_of_a_gram_matrix_are_no_longer_than_truncated_sums_allow(kernels, path, c, pixels):
    size = kernels.workspace("gram", path, (pixels, 1, 1, c, 0, 1))
    assert size % (c * (c + 1)) == 0 and pixels / (size // (c * (c + 1))) <= 4096


@pytest.mark.parametrize("path", ["portable", "hopper"])
@pytest.mark.parametrize("c", [24, 27])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_reaches_what_depends_on_it_and_nothing_else(kernels, dtype, c, path):
    kernel_cases.check_nan(kernels, dtype, c, path)
