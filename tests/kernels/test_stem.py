"""The stem's pooling: the reference against autograd, Triton's kernels against the reference."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fastres import cases, static_checks
from fastres.kernels import reference
from fastres.kernels.reference.stem import NO_GRADIENT
from fastres.numerics import assert_three_way, relative_error

CASES = {case.name: case for case in cases.BY_FAMILY["stem"]}
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SHAPES = [
    (2, 15, 14, 24),
    (1, 1, 1, 16),
    (3, 2, 3, 3),
    (2, 7, 7, 64),
    (1, 13, 6, 80),
    (2, 1, 9, 8),
    (1, 33, 1, 1),
    (0, 4, 4, 24),
]
EXACT = 1e-12


def sizes(shape):
    return dict(zip("nhwc", shape, strict=True))


@pytest.fixture(params=[(10**6, 16), (1, 16), (1, 3)], ids=["a row a program", "all rows", "3 rows a program"])
def walks(request, triton_kernels, monkeypatch):
    """How far programs walk down the image. Small tensors are else shared among programs of one row each."""
    from fastres.kernels.triton import stem

    programs, rows = request.param
    for part, configs in stem.CONFIGS.items():
        walking = {name: config._replace(programs=programs, rows=rows) for name, config in configs.items()}
        monkeypatch.setitem(stem.CONFIGS, part, walking)


def coarse(dtype, device, shape, seed=0):
    """Inputs whose products and sums are exact in float32, with many ties: every rounding gives the same.

    Scales of both signs and 0, shifts that leave whole windows below 0.
    """
    generator = torch.Generator().manual_seed(seed)
    n, h, w, c = shape

    def draw(*shape, low=-4, high=5):
        return (torch.randint(low, high, shape, generator=generator) / 4).to(device)

    bn, grad = draw(4, c), draw(4, c)
    bn[2] = torch.tensor([1.0, -0.5, 2.0, 0.25, -4.0, 0.0], device=device)[torch.arange(c) % 6]
    y, g = draw(n, h, w, c).to(dtype), draw(n, (h + 1) // 2, (w + 1) // 2, c).to(dtype)
    return y, g, bn, grad


# Triton's kernels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_computes_what_the_reference_defines(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, sizes(shape))


@pytest.mark.parametrize("wanted", static_checks.requests("stem"), ids=str)
def test_every_configuration_compiles_and_computes_what_the_reference_defines(wanted, check_configuration):
    check_configuration("stem", wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_same_bits_as_the_reference_where_nothing_is_rounded(dtype, shape, k, device, walks, poisoned):
    y, g, bn, grad = coarse(dtype, device, shape)
    expected = reference.stem_pool(y, bn)
    for ours, value in zip(k.stem_pool(y, bn), expected, strict=True):
        assert ours.dtype == value.dtype and torch.equal(ours, value)
    argmax, input_hw = expected[2], shape[1:3]
    for options in ({"y": y, "grad": grad}, {"y": None, "grad": None}, {"y": y, "grad": None}, {"grad": grad}):
        ours = k.stem_pool_bwd(g, argmax, input_hw, bn, **options)
        value = reference.stem_pool_bwd(g, argmax, input_hw, bn, **options)
        assert ours.dtype == value.dtype and torch.equal(ours, value)


def test_the_data_of_bit_comparisons_has_every_tap_and_cut_off_windows(device):
    y, _, bn, _ = coarse(torch.float32, device, (2, 15, 14, 24))
    assert reference.stem_pool(y, bn)[2].unique().tolist() == [*range(9), NO_GRADIENT]


@pytest.mark.parametrize("shape", [(2, 6, 4, 8), (1, 7, 5, 3)], ids=str)
def test_memory_around_the_tensors_is_not_used(shape, k, device, walks):
    n, h, w, c = shape
    y, g, bn, grad = coarse(torch.float32, device, (n + 2, h, w, c))
    argmax = reference.stem_pool(y, bn)[2]
    for t in (y, g):
        t[0] = t[-1] = float("nan")
    # As if windows behind the last row had chosen a pixel of it.
    argmax[0] = argmax[-1] = torch.arange(c, device=device) % 3
    y, g, argmax = y[1:-1], g[1:-1], argmax[1:-1]
    for ours, value in zip(k.stem_pool(y, bn), reference.stem_pool(y, bn), strict=True):
        assert torch.equal(ours, value)
    dy = k.stem_pool_bwd(g, argmax, (h, w), bn, grad, y=y)
    assert torch.equal(dy, reference.stem_pool_bwd(g, argmax, (h, w), bn, grad, y=y))


@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_the_first_of_equal_values_is_chosen(scale, k, device, walks):
    y = torch.full((2, 7, 6, 8), 0.5, device=device)
    bn = torch.tensor([0.0, 1.0, scale, 3.0], device=device)[:, None].expand(4, 8).contiguous()
    out, y_argmax, argmax = k.stem_pool(y, bn)
    assert (out == scale * 0.5 + 3).all() and (y_argmax == 0.5).all()
    expected = torch.tensor([[4, 3, 3], *[[1, 0, 0]] * 3], device=device)
    assert (argmax == expected[None, :, :, None]).all()


def test_windows_whose_maximum_is_not_above_zero_pass_no_gradient(k, device, walks):
    y, g, bn, _ = coarse(torch.float32, device, (2, 7, 6, 8))
    bn[2], bn[3] = 1, -y.amax()
    y[:, 6] = -float("inf")
    out, _, argmax = k.stem_pool(y, bn)
    assert not out.any() and (argmax == NO_GRADIENT).all()
    assert not k.stem_pool_bwd(g, argmax, (7, 6), bn, None).any()


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_nan_and_infinity_come_out_where_the_reference_has_them(dtype, k, device, walks):
    y, g, bn, grad = coarse(dtype, device, (2, 9, 7, 24))
    # One special value per channel, alone or with NaN behind it in the same windows.
    for channel, (special, second) in enumerate(
        itertools.product((float("nan"), float("inf"), -float("inf")), (False, True))
    ):
        for at in (channel, channel + 6):  # scales of both signs, and 0
            y[1, 3, 3, at] = special
            if second:
                y[1, 4, 2, at] = y[1, 4, 4, at] = float("nan")
    g[0, 1, 1, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    pooled = reference.stem_pool(y, bn)
    expected = *pooled, reference.stem_pool_bwd(g, pooled[2], (9, 7), bn, grad, y=y)
    ours = *k.stem_pool(y, bn), k.stem_pool_bwd(g, pooled[2], (9, 7), bn, grad, y=y)
    assert expected[0].isnan().any() and expected[0].isinf().any() and expected[3].isnan().any()
    for result, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["stem_pool", "stem_pool_bwd"])
def test_mean_of_a_thousand_standard_deviations(name, k, device):
    t = CASES[name].make(cases.Maker(torch.float32, device), **sizes((2, 9, 7, 24)), mean=1000.0)
    exact, ours = CASES[name].run(reference, cases.exact_inputs(t)), CASES[name].run(k, cases.copied(t))
    stock = CASES[name].stock(cases.copied(t))
    for result in exact:
        assert_three_way(result, ours[result], stock[result], exact[result], torch.float32)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(3, 15, 14, 24), (2, 7, 9, 5)], ids=str)
def test_whole_stem_against_autograd(shape, mean, dtype, k, device, walks, poisoned):
    """The sums of the backward come from the pooled tensors; the reference's statistics, which have their own tests."""
    f = cases.Maker(dtype, device)
    n, h, w, c = shape
    y, g = f.activation(*shape, mean=mean), f.activation(n, (h + 1) // 2, (w + 1) // 2, c)
    weight, bias = f.vector(c, -1.5, 1.5), f.vector(c, -0.5, 0.5)
    exact = autograd(y.double(), weight.double(), bias.double(), g.double())
    stock = autograd(y, weight, bias, g)
    pooling = {name: getattr(k, name) for name in ("stem_pool", "bn_bwd_reduce", "stem_pool_bwd")}
    ours = fused(SimpleNamespace(**vars(reference) | pooling), y, weight, bias, g)
    for name, value in exact.items():
        assert_three_way(name, ours[name], stock[name], value, dtype)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_twice_and_inputs_unwritten(name, k, device, walks):
    t = CASES[name].make(cases.Maker(torch.float16, device), **sizes((2, 9, 7, 80)))
    before = cases.copied(t)
    first, second = CASES[name].run(k, t), CASES[name].run(k, t)
    for result in first:
        assert torch.equal(first[result], second[result])
    for key, value in before.items():
        assert torch.equal(t[key], value) if isinstance(value, torch.Tensor) else t[key] is value


def test_the_grid_covers_every_window_and_is_legal(triton_kernels):
    from fastres.kernels.triton.stem import CONFIGS, tiling

    config = CONFIGS[90]["stem_pool"]
    assert tiling(torch.Size((256, 56, 56, 64)), 2, config) == ((896, 4), 14, 16, 64)
    assert tiling(torch.Size((1, 56, 56, 64)), 2, config) == ((4, 56), 1, 16, 64)
    assert tiling(torch.Size((2, 7, 7, 3)), 2, config)[2:] == (32, 16)
    for windows in ((1, 1, 1, 1), (4096, 1024, 1024, 64), (2**22, 1, 1024, 1), (1, 2**19, 4, 100), (3, 17, 5, 10**5)):
        for itemsize in (2, 4):
            (tiles, parts), rows, columns, channels = tiling(torch.Size(windows), itemsize, config)
            n, ho, wo, c = windows
            assert (parts - 1) * rows < ho <= parts * rows and parts < 2**16
            assert tiles == -(-n * wo // columns) * -(-c // channels) < 2**31
            assert parts * tiles >= config.programs or rows == 1


def test_bad_input_names_the_argument_and_the_remedy(k, device, monkeypatch):
    y, g, bn, grad = coarse(torch.float32, device, (2, 5, 4, 16))
    argmax = k.stem_pool(y, bn)[2]
    with pytest.raises(TypeError, match="stem_pool: y is torch.float64.*backend='reference'"):
        k.stem_pool(y.double(), bn)
    with pytest.raises(ValueError, match=r"stem_pool: y must be dense.*pass y.contiguous\(\)"):
        k.stem_pool(y.permute(0, 3, 1, 2), bn)
    with pytest.raises(ValueError, match=r"stem_pool: bn must be dense float32 \[4, 16\]"):
        k.stem_pool(y, bn[:, :8])
    with pytest.raises(ValueError, match=r"stem_pool_bwd: g must be dense"):
        k.stem_pool_bwd(g[:1].expand(g.shape), argmax, (5, 4), bn, grad, y=y)
    with pytest.raises(ValueError, match=r"stem_pool_bwd: grad must be dense float32 \[4, 16\]"):
        k.stem_pool_bwd(g, argmax, (5, 4), bn, grad.double(), y=y)
    for wrong in (argmax.int(), argmax[:1], argmax.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(ValueError, match=r"stem_pool_bwd: argmax must be dense uint8 \(2, 3, 2, 16\)"):
            k.stem_pool_bwd(g, wrong, (5, 4), bn, grad, y=y)
    with pytest.raises(ValueError, match=r"input_hw is \(7, 4\), which has \(4, 2\) windows, argmax has \(3, 2\)"):
        k.stem_pool_bwd(g, argmax, (7, 4), bn, grad, y=y)
    with pytest.raises(
        ValueError, match=r"stem_pool_bwd: y has shape \(2, 5, 4, 16\), must have dy's, \(2, 6, 4, 16\)"
    ):
        k.stem_pool_bwd(g, argmax, (6, 4), bn, grad, y=y)
    with pytest.raises(ValueError, match=r"stem_pool_bwd: y must be dense"):
        k.stem_pool_bwd(g, argmax, (5, 4), bn, grad, y=y[:1].expand(y.shape))
    monkeypatch.setattr("fastres.kernels.triton._common.INTERPRETED", False)
    with pytest.raises(ValueError, match="stem_pool: y is on cpu, Triton kernels need CUDA"):
        k.stem_pool(y.cpu(), bn.cpu())
    with pytest.raises(ValueError, match="stem_pool_bwd: g is on cpu, Triton kernels need CUDA"):
        k.stem_pool_bwd(g.cpu(), argmax.cpu(), (5, 4), bn.cpu(), None)


# The reference


def autograd(y, weight, bias, g, running=None):
    """out and the gradients of y (NHWC), gamma and beta by PyTorch's own operators."""
    leaves = [t.detach().requires_grad_() for t in (y, weight, bias)]
    mean_and_var = (None, None) if running is None else running
    z = F.batch_norm(leaves[0].permute(0, 3, 1, 2), *mean_and_var, *leaves[1:], training=running is None)
    out = F.max_pool2d(z.relu(), 3, 2, 1).permute(0, 2, 3, 1)
    grads = torch.autograd.grad(out, leaves, g)
    return {"out": out.detach(), **dict(zip(("dy", "dgamma", "dbeta"), grads, strict=True))}


def fused(k, y, weight, bias, g, running=None):
    """The same by the kernels of a namespace."""
    if running is None:
        bn = k.bn_finalize(k.channel_stats(y), weight, bias, None, None, None, 0.1, 1e-5)
    else:
        bn = k.bn_constants(*running, weight, bias, 1e-5, y.dtype)
    out, y_argmax, argmax = k.stem_pool(y, bn)
    sums, _ = k.bn_bwd_reduce(g, y_argmax, bn, out=out)
    grad = k.bn_bwd_finalize(sums, bn, y.shape[:3].numel() if running is None else None)
    dy = k.stem_pool_bwd(g, argmax, y.shape[1:3], bn, grad, y=y if running is None else None)
    return {"out": out, "dy": dy, "dgamma": grad[0], "dbeta": grad[1]}


@pytest.mark.parametrize("constant", [False, True], ids=["batch statistics", "constant statistics"])
@pytest.mark.parametrize("shape", [(2, 15, 14, 6), (3, 1, 1, 4), (2, 2, 3, 5), (1, 7, 7, 3)], ids=str)
def test_reference_against_autograd(shape, constant):
    f = cases.Maker(torch.float64)
    n, h, w, c = shape
    y, g = f.activation(*shape, mean=1.0), f.activation(n, (h + 1) // 2, (w + 1) // 2, c)
    weight, bias = f.vector(c, -1.5, 1.5), f.vector(c, -0.5, 0.5)
    running = (f.vector(c, -1, 1), f.vector(c)) if constant else None
    ours = fused(reference, y, weight, bias, g, running)
    for name, expected in autograd(y, weight, bias, g, running).items():
        assert relative_error(ours[name], expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_reference_within_twice_the_error_of_stock(name, dtype):
    case = CASES[name]
    t = case.make(cases.Maker(dtype), **case.sizes)
    ours, stock = case.run(reference, cases.copied(t)), case.stock(cases.copied(t))
    exact = case.run(reference, cases.exact_inputs(t))
    assert ours.keys() == stock.keys() == exact.keys()
    for result in exact:
        assert_three_way(result, ours[result], stock[result], exact[result].double(), dtype)
