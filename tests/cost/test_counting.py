"""Bytes and FLOPs of our own kernels."""

from types import SimpleNamespace

import pytest
import torch

from fastres import cases, cost, functional, plan
from fastres.cost import kernels
from fastres.cost.counting import contract_bytes, counting
from fastres.cost.traffic import Traffic
from fastres.functional import BatchNormParams
from fastres.kernels import library, reference
from fastres.parts import PARTS

META = torch.device("meta")


def namespace(*modules):
    return SimpleNamespace(
        **{name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in reference.__all__}
    )


def test_every_kernel_is_known():
    without_products = {name for name in reference.__all__ if name.startswith(("add_", "bn_", "channel_", "stem_"))}
    assert set(kernels._FLOPS) | without_products == set(reference.__all__)
    named = {*kernels._FLOPS, *kernels._STRIDED, *kernels._UPDATED, *kernels._CHANGED}
    assert named <= set(reference.__all__)


@pytest.mark.parametrize("case", cases.BY_NAME.values(), ids=lambda case: case.name)
def test_flops_by_formula_are_those_of_the_library_operators(case):
    """But for Gram matrices, of which the library computes both halves."""
    t = case.make(cases.Maker(torch.float32), **case.sizes)
    k = namespace(library, reference)
    by_operator = cost.count(k, lambda k: case.run(k, cases.copied(t)))
    with Traffic(PARTS["h200"]) as traffic:
        case.run(counting(k, traffic, contract_bytes), cases.copied(t))
    assert [step.kernel for step in by_operator] == [step.kernel for step in traffic.steps]
    for counted, formula in zip(by_operator, traffic.steps, strict=True):
        if counted.kernel in ("gram", "projection_gram"):
            assert formula.flops <= counted.flops < 2 * formula.flops
        elif counted.kernel in ("gram_bwd", "gram_finalize"):
            # Besides, the operators multiply matrices with vectors.
            assert formula.flops <= counted.flops <= 1.2 * formula.flops
        else:
            assert formula.flops == counted.flops, counted.kernel


@pytest.mark.parametrize("case", cases.BY_NAME.values(), ids=lambda case: case.name)
def test_a_kernel_in_several_passes_moves_at_least_its_contract(case):
    """On the meta device, which stands for a GPU, as on a real one."""
    t = case.make(cases.Maker(torch.bfloat16, META), **case.sizes)
    k = namespace(library, reference)
    counted = cost.count(k, lambda k: case.run(k, t))
    with Traffic(PARTS["h200"]) as traffic:
        case.run(counting(k, traffic, contract_bytes), t)
    for several, one in zip(counted, traffic.steps, strict=True):
        if several.backend == "library" and several.kernel in case.kernels:
            assert several.bytes >= one.bytes, several.kernel


N, H, C = 2, 5, 24
ACTIVATION = N * H * H * C * 2


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    "kernel, call, activations",
    [
        ("bn_act", lambda k, y, v: k.bn_act(y, v), 2),
        ("bn_act", lambda k, y, v: k.bn_act(y, v, y.clone()), 3),
        ("bn_bwd_reduce", lambda k, y, v: k.bn_bwd_reduce(y, y.clone(), v, out=y.clone()), 3),
        ("bn_bwd_apply", lambda k, y, v: k.bn_bwd_apply(y, y.clone(), v, v.clone(), need_residual=True), 3),
        ("bn_bwd_apply", lambda k, y, v: k.bn_bwd_apply(y, None, v, v.clone()), 2),
        ("gram", lambda k, y, v: k.gram(y, v), 1),
        ("expand_wgrad", lambda k, y, v: k.expand_wgrad(y, y.clone(), y.clone(), v), 4),
    ],
)
def test_a_contract_reads_and_writes_every_tensor_once(kernel, call, activations):
    y, vectors = bf16(N, H, H, C), torch.empty(4, C, device="meta")
    with Traffic(PARTS["h200"]) as traffic:
        call(counting(namespace(reference), traffic, contract_bytes), y, vectors)
    (step,) = [step for step in traffic.steps if step.kernel == kernel]
    small = 8 * vectors.nbytes + C * C * 4
    assert activations * ACTIVATION < step.bytes <= activations * ACTIVATION + small


def test_a_projection_touches_every_second_pixel_and_updates_in_place():
    dx, x, g = bf16(N, H, H, C), bf16(N, H, H, C), bf16(N, 3, 3, 8)
    u, v, k = bf16(8, C), bf16(C, C), torch.empty(C, device="meta")
    (step,) = cost.count(namespace(reference), lambda n: n.projection_dgrad(dx, g, x, u, v, k, 2))
    arguments = kernels.bind("projection_dgrad", (dx, g, x, u, v, k, 2), {})
    pixels = N * 3 * 3 * C * 2
    others = sum(t.nbytes for t in (g, u, v, k))
    assert contract_bytes("projection_dgrad", arguments, None) == 3 * pixels + others
    assert step.kernel == "projection_dgrad" and step.backend == "reference"


def test_counting_changes_no_result():
    case = cases.BY_NAME["bn_act, shortcut projected, ReLU"]
    t = case.make(cases.Maker(torch.float32), **case.sizes)
    seen = []
    k = plan.resolve(torch.float32, torch.device("cpu"))
    steps = cost.count(k, lambda k: seen.append(case.run(k, t)))
    assert torch.equal(seen[0]["out"], case.run(k, t)["out"])
    assert [(step.kernel, step.backend) for step in steps] == [("bn_act", "library")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_flop_counter_knows_the_fused_operators(dtype):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 16, 6, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(8, 16, 3, 3, dtype=dtype, requires_grad=True)
    bn = BatchNormParams(torch.ones(8), torch.zeros(8), None, None, None, True, 0.1, 1e-5)
    products = 2 * (2 * 6 * 5 * 8) * 16 * 9
    with FlopCounterMode(display=False) as counter:
        out = functional.conv_bn_relu(x, weight, bn, padding=(1, 1))
        assert counter.get_total_flops() == products
        out.sum().backward()
    assert counter.get_total_flops() == 3 * products


def test_plans_are_wrapped_only_inside():
    marker = SimpleNamespace()
    with plan.wrapping(lambda k: marker):
        assert plan.resolve(torch.float32, META) is marker
    assert plan.resolve(torch.float32, META) is not marker
