"""The CUDA kernels, run on the CPU, against the reference kernels in float64."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import Case, forms_of

from fastres.kernels import reference

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
@pytest.mark.parametrize("c", [24, 27])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_reaches_what_depends_on_it_and_nothing_else(kernels, dtype, c, path):
    k = 40
    generator = torch.Generator().manual_seed(0)
    x, g, dx = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 6, 5, c), (2, 3, 3, k), (2, 6, 5, c)))
    weight, v = (torch.randn(size, generator=generator).to(dtype) for size in ((k, c), (c, c)))
    bn, shift = torch.randn(4, k, generator=generator), torch.randn(c, generator=generator)
    x[1, 1, 1] = torch.nan  # a pixel between the strided ones
    x[0, 2, 4, 13] = torch.nan
    gram, total = kernels.projection_gram(x, 2, path)
    assert gram[13].isnan().all() and gram.isnan().sum() == 2 * c - 1 and total.isnan().nonzero().tolist() == [[13]]
    for out in (
        kernels.projection_fprop(x, weight, bn, 2, path=path),
        kernels.projection_fprop(x, weight, bn, 2, g, True, path),
        kernels.projection_conv(x, weight, 2, path)[0],
    ):
        assert out[0, 1, 2].isnan().all() and out.isnan().sum() == k
    p, sum_g = kernels.projection_wgrad(g, x, 2, path=path)
    assert p[:, 13].isnan().all() and p.isnan().sum() == k and sum_g.isfinite().all()
    for relu in (False, True):
        after = dx.clone()
        kernels.projection_dgrad(after, g, x, weight, v, shift, 2, relu=relu, path=path)
        # The mask of x_s > 0 turns what is NaN to zero, but not where x_s is NaN itself.
        nan = torch.ones(c, dtype=torch.bool) if not relu else ~(x[0, 2, 4] <= 0)
        assert torch.equal(after[0, 2, 4].isnan(), nan) and after.isnan().sum() == nan.sum()

    mask = torch.randn(2, 3, 3, k, generator=generator).to(dtype)
    g[0, 0, 0, 5], mask[0, 0, 0, 5] = torch.nan, -1  # masked
    mask[1, 2, 2, 7] = torch.nan  # lets g through
    clean = x.nan_to_num(nan=1.0)
    p, sum_g = kernels.projection_wgrad(g, clean, 2, mask, path=path)
    exact = reference.projection_wgrad(g.nan_to_num(nan=0).double(), clean.double(), 2, mask.double())
    torch.testing.assert_close(p.double(), exact[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sum_g.double(), exact[1], atol=1e-4, rtol=1e-4)
    g[1, 2, 2, 7] = torch.nan
    p, sum_g = kernels.projection_wgrad(g, clean, 2, mask, path=path)
    assert p[7].isnan().all() and p.isnan().sum() == c and sum_g.isnan().nonzero().tolist() == [[7]]
    after = dx.clone()
    kernels.projection_dgrad(after, g, clean, weight, v, shift, 2, mask, path=path)
    assert after[1, 4, 4].isnan().all() and after.isnan().sum() == c
