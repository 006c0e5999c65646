"""Gram folding: second moments and small matrices, Triton's kernels against the reference, and the reference itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import cases, static_checks
from fastres.kernels import reference
from fastres.kernels.reference._common import scaled_to_float16
from fastres.kernels.reference.gram import Gram

ROWS, K, N = 96, 24, 40

CASES = {case.name: case for case in cases.BY_FAMILY["gram"]}
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SHAPES = [(2, 9, 8, 24, 40), (1, 5, 1, 16, 8), (3, 7, 5, 3, 33), (1, 13, 11, 72, 56)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_computes_what_the_reference_defines(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, dict(zip("nhwkc", shape, strict=True)))


@pytest.mark.parametrize("wanted", static_checks.requests("gram"), ids=str)
def test_every_configuration_compiles_and_computes_what_the_reference_defines(wanted, check_configuration):
    check_configuration("gram", wanted)


def inputs(dtype, device="cpu", spread=1.0, k=K, n=N):
    """Rows a after a ReLU and g, weights, and the batch norm that `gram_finalize` gives."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    a, g = normal(1, 1, ROWS, k).relu(), spread * (normal(1, 1, ROWS, n) + 0.1)
    weight = normal(n, k) / k**0.5
    a, g, weight = (t.to(device, dtype) for t in (a, g, weight))
    gamma, beta = (torch.rand(n, generator=generator).to(device) for _ in range(2))
    moments = reference.projection_gram(a, 1)
    return a, g, weight, reference.gram_finalize(moments, ROWS, weight, gamma, beta, None, None, None, 0.1, 1e-5)


@pytest.mark.parametrize("namespace", ["reference", "triton"])
@pytest.mark.parametrize("spread, inner, outer", [(1.0, K, N), (1e-4, K, N), (1.0, 137, 264)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_inputs_gradient_has_the_sums_that_it_has_without_rounding(
    dtype, spread, inner, outer, namespace, k, device
):
    """Its mean is zero, and sum da*a what exact weights give, to float32's rounding; the operands as a product reads
    them: in float16, v times a power of two. A constant channel of a has no part in it.
    """
    if namespace == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    a, g, weight, (bn, mean, scatter) = inputs(dtype, device, spread, inner, outer)
    scatter[3], scatter[:, 3] = 0, 0
    p, sum_g = reference.projection_wgrad(g, a, 1)
    gram_bwd = {"reference": reference, "triton": k}[namespace].gram_bwd
    dw, _, u, v, k, v_scale, d = gram_bwd(p, sum_g, weight, bn, ROWS, mean, scatter)
    assert u.dtype == v.dtype == dtype
    if dtype == torch.float16:
        v = v.float() * v_scale
        assert spread == 1 or not torch.equal(v.half().float(), v)
    else:
        assert v_scale is None
    mean_g, mean_a = (t.double().flatten(0, 2).mean(0) for t in (g, a))
    u, v, k, wide = u.double(), v.double(), k.double(), weight.double()
    if dtype == torch.float32:
        assert d is None
        d = torch.zeros(inner, device=device)
    assert d.dtype == torch.float32 and d[3] == 0
    d = d.double()
    terms = mean_g.abs() @ u.abs() + mean_a.abs() @ v.abs() + mean_a * d.abs()
    error = (mean_g @ u + mean_a @ v + mean_a * d + k).abs()
    # Roundings of the two means, of both products and of k.
    assert (error <= (2 * ROWS + outer + inner + 6) * 2.0**-24 * terms).all()

    centred = p.double() - torch.outer(sum_g.double(), mean.double())
    found = (u * centred).sum(0) + (v * scatter.double()).sum(0) + d * scatter.double().diagonal()
    terms = (u * centred).abs().sum(0) + (v * scatter).abs().sum(0) + (wide * dw).abs().sum(0)
    error = (found - (wide * dw.double()).sum(0)).abs()
    error[3] = 0
    assert (error <= (2 * outer + 2 * inner + 8) * 2.0**-24 * terms).all()
    if dtype != torch.float32:
        assert (error < (d * scatter.double().diagonal()).abs().clamp(min=2.0**-20 * terms)).all(), "d makes no odds"


@pytest.mark.parametrize("largest", [1e-40, 1e-30, 1e-7, 1.0, 7e4, 3e38])
def test_v_keeps_its_digits_in_float16(largest):
    v = largest * (2 * torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) - 1)
    half, factor = scaled_to_float16(v)
    assert half.dtype == torch.float16 and factor.dtype == torch.float32 and factor.shape == ()
    assert torch.frexp(factor).mantissa == 0.5, "no power of two"
    assert half.abs().max() < 2**15 and (largest < 2.0**-110 or half.abs().max() >= 2**14)
    error = half.double() * factor.double() - v.double()
    assert (error.abs() <= 2.0**-11 * v.double().abs() + 2.0**-25 * factor.double()).all()


def test_zeros_stay_zero_in_float16():
    half, factor = scaled_to_float16(torch.zeros(24, 24))
    assert not half.any() and factor.isfinite()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_in_float16(value):
    v = torch.ones(24, 24)
    v[3, 5] = value
    half, factor = scaled_to_float16(v)
    assert not (half[3, 5].float() * factor).isfinite() and half[3, 5].isnan() == v[3, 5].isnan()


class Products(TorchDispatchMode):
    """The dtypes of the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_product_on_a_gpu_is_left_to_tf32(dtype, monkeypatch):
    """With `small_product` as it is there, no product of matrices is left in float32."""
    monkeypatch.setitem(reference.gram_bwd.__globals__, "small_product", lambda a, b: (a.double() @ b.double()).float())
    _, _, weight, finalized = inputs(dtype)
    moments = Gram(torch.eye(K), torch.ones(K), torch.zeros(K))
    with Products() as products:
        reference.gram_finalize(moments, ROWS, weight, *[torch.ones(N)] * 4, None, 0.1, 1e-5)
        bn, mean, scatter = finalized
        reference.gram_bwd(torch.ones(N, K), torch.ones(N), weight, bn, ROWS, mean, scatter)
    assert products.dtypes == [torch.float64] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a GPU's")
def test_tf32_changes_nothing(monkeypatch):
    found = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        a, _, weight, finalized = inputs(torch.bfloat16, "cuda")
        bn, mean, scatter = finalized
        p, sum_g = (torch.ones(size, device="cuda") / 3 for size in ((N, K), (N,)))
        found.append((*finalized, *reference.gram_bwd(p, sum_g, weight, bn, ROWS, mean, scatter)))
    # The Gram matrix itself is a product of activations.
    pairs = [pair for pair in list(zip(*found, strict=True))[3:] if pair[0] is not None]
    assert pairs and all(torch.equal(exact, fast) for exact, fast in pairs)
