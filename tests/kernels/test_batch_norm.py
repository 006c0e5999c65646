"""The batch norm family: the reference against autograd, Triton's kernels against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from fastres import cases, static_checks
from fastres.cases.batch_norm import masked
from fastres.kernels import library, reference
from fastres.kernels.reference.batch_norm import ChannelStats
from fastres.numerics import assert_three_way, relative_error

CASES = {case.name: case for case in cases.BY_FAMILY["batch_norm"]}
TRITON_CASES = [name for name, case in CASES.items() if case.kernels[0] in ("bn_act", "bn_bwd_reduce", "bn_bwd_apply")]
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SHAPES = [(2, 7, 11, 1), (3, 5, 7, 3), (2, 9, 7, 24), (1, 13, 5, 80), (2, 8, 8, 64), (0, 4, 4, 24), (1, 1, 1, 16)]
EXACT = 1e-12


def sizes(shape):
    return dict(zip("nhwc", shape, strict=True))


def inputs(name, dtype, device, shape, **options):
    return CASES[name].make(cases.Maker(dtype, device), **sizes(shape), **options)


def sum_bounds(t):
    """Bounds of the errors of dgamma and dbeta from float64 inputs, whatever the order of additions: n roundings of the
    sum of magnitudes, where n counts the additions and the few operations on a term (Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, equation 4.4).
    """
    g, rows = masked(t).abs(), t["g"].shape[:3].numel()
    unit = (rows + 4) * 2.0**-24
    bounds = {"dbeta": unit * g.sum((0, 1, 2))}
    for branch, y, bn in (("", "y", "bn"), ("residual ", "residual", "residual_bn")):
        if y in t:
            terms = g * (t[y] - t[bn][0]).abs() * t[bn][1]
            bounds |= {f"{branch}dgamma": unit * terms.sum((0, 1, 2)), f"{branch}dbeta": bounds["dbeta"]}
    return bounds


# Triton's kernels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton_computes_what_the_reference_defines(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, sizes(shape), sum_bounds if "bn_bwd_reduce" in name else None)


@pytest.mark.parametrize("wanted", static_checks.requests("batch_norm"), ids=str)
def test_every_configuration_compiles_and_computes_what_the_reference_defines(wanted, check_configuration):
    check_configuration("batch_norm", wanted, sum_bounds if "bn_bwd_reduce" in wanted.case else None)


@pytest.fixture
def few_programs(triton_kernels, monkeypatch):
    """Grids of a few programs, so that each loops over several tiles of a tensor that the interpreter can bear."""
    from fastres.kernels.triton import batch_norm

    for part, configs in batch_norm.CONFIGS.items():
        few = {name: config._replace(programs=3) for name, config in configs.items()}
        monkeypatch.setitem(batch_norm.CONFIGS, part, few)


@pytest.mark.parametrize("name", TRITON_CASES)
def test_programs_that_take_several_tiles(name, compare, poisoned, few_programs):
    compare(CASES[name], torch.float32, sizes((3, 7, 11, 64)), sum_bounds if "bn_bwd_reduce" in name else None)


@pytest.mark.parametrize("name", [name for name in TRITON_CASES if "constant" not in name])
def test_mean_of_a_thousand_standard_deviations(name, k, device):
    t = inputs(name, torch.float32, device, (2, 9, 7, 24), mean=1000.0)
    exact, ours = CASES[name].run(reference, cases.exact_inputs(t)), CASES[name].run(k, cases.copied(t))
    stock = CASES[name].stock(cases.copied(t))
    for result in exact:
        assert_three_way(result, ours[result], stock[result], exact[result], torch.float32)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON_CASES)
def test_nan_and_infinity_come_out_where_the_reference_has_them(name, dtype, k, device):
    t = inputs(name, dtype, device, (2, 5, 7, 24))
    # One special value per operand and channel, so that each is seen alone.
    operands = [value for key, value in t.items() if key in ("g", "y", "out", "residual") and value is not None]
    for channel, (operand, special) in enumerate(
        itertools.product(operands, (float("nan"), float("inf"), -float("inf")))
    ):
        operand[1, 2, 3, channel] = special
    expected, ours = CASES[name].run(reference, cases.copied(t)), CASES[name].run(k, cases.copied(t))
    assert not any(value.isfinite().all() for value in expected.values())
    for result, value in expected.items():
        torch.testing.assert_close(ours[result], value, equal_nan=True, rtol=1e-2, atol=1e-2)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours[result]), kind(value)), f"{result}: {kind.__name__}"


@pytest.mark.parametrize("name", TRITON_CASES)
def test_same_bits_twice_and_inputs_unwritten(name, k, device, few_programs):
    t = inputs(name, torch.float16, device, (2, 9, 7, 80))
    before = cases.copied(t)
    first, second = CASES[name].run(k, t), CASES[name].run(k, t)
    for result in first:
        assert torch.equal(first[result], second[result])
    for key, value in before.items():
        assert torch.equal(t[key], value) if isinstance(value, torch.Tensor) else t[key] is value


def test_masks_of_forward_and_backward_agree_to_the_bit(k, device):
    f = cases.Maker(torch.float32, device)
    y, g = f.activation(2, 16, 16, 64), f.activation(2, 16, 16, 64)
    bn = f.bn(y)
    # Rows that put z within a rounding error of 0: shift cancels scale*y.
    y[0, 0] = -bn[3] / bn[2]
    out = k.bn_act(y, bn)
    by_output, by_input = k.bn_bwd_reduce(g, y, bn, out=out)[0], k.bn_bwd_reduce(g, y, bn, relu=True)[0]
    assert torch.equal(by_output, by_input)
    grad = reference.bn_bwd_finalize(by_output, bn, 512)
    assert torch.equal(k.bn_bwd_apply(g, y, bn, grad, out=out)[0], k.bn_bwd_apply(g, y, bn, grad, relu=True)[0])


def test_an_unmasked_identity_shortcut_gets_g_itself(k, device):
    t = inputs("bn_bwd_apply, mask none, shortcut identity", torch.float32, device, (1, 3, 3, 8))
    assert k.bn_bwd_apply(**t)[1] is t["g"]


def test_sums_of_no_rows_are_zero(k, device, poisoned):
    t = inputs("bn_bwd_reduce, mask output, two branches", torch.float16, device, (0, 3, 3, 40))
    for sums in k.bn_bwd_reduce(**t):
        assert sums.shape == (1, 2, 40) and not sums.any()


def test_the_grid_depends_on_shape_dtype_and_part_only(triton_kernels):
    from fastres.kernels.triton.batch_norm import CONFIGS, splits, tile_shape

    config = CONFIGS[90]["bn_bwd_reduce"]
    assert tile_shape(64, 2, config) == (32, 64)
    assert tile_shape(2048, 4, config) == (16, 64)
    assert tile_shape(3, 2, config) == (128, 16)
    for rows, channels in ((0, 64), (1, 1), (802816, 64), (12544, 2048), (10**10, 16), (100, 10**6)):
        tile = tile_shape(channels, 2, config)
        programs = splits(rows, channels, *tile, config)
        assert programs >= 1
        assert programs == 1 or programs * -(-channels // tile[1]) <= config.programs
        assert programs == 1 or (programs - 1) * tile[0] < rows


def test_bad_input_names_the_argument_and_the_remedy(k, device, monkeypatch):
    f = cases.Maker(torch.float32, device)
    y = f.activation(2, 4, 4, 16)
    bn, grad = f.bn(y), f.bn(y)
    with pytest.raises(TypeError, match="bn_act: y is torch.float64.*backend='reference'"):
        k.bn_act(y.double(), bn)
    with pytest.raises(ValueError, match=r"bn_act: y must be dense.*pass y.contiguous\(\)"):
        k.bn_act(y.permute(0, 3, 1, 2), bn)
    with pytest.raises(ValueError, match=r"bn_bwd_reduce: g must be dense"):
        k.bn_bwd_reduce(y[:1, :1, :1].expand(y.shape), y, bn)
    with pytest.raises(ValueError, match=r"bn_act: residual has shape \(1, 4, 4, 16\), must have y's"):
        k.bn_act(y, bn, y[:1])
    with pytest.raises(ValueError, match=r"bn_act: bn must be dense float32 \[4, 16\]"):
        k.bn_act(y, bn[:, :8])
    with pytest.raises(ValueError, match=r"bn_bwd_apply: grad must be dense float32"):
        k.bn_bwd_apply(y, y, bn, grad.double())
    with pytest.raises(ValueError, match="bn_act: residual_bn was given without residual"):
        k.bn_act(y, bn, None, bn)
    with pytest.raises(ValueError, match="bn_bwd_reduce: residual and residual_bn describe one branch"):
        k.bn_bwd_reduce(y, y, bn, residual=y)
    with pytest.raises(ValueError, match="bn_bwd_apply: the ReLU's mask needs its output or its input"):
        k.bn_bwd_apply(y, None, bn, grad, relu=True)
    with pytest.raises(ValueError, match="bn_bwd_apply: residual needs residual_bn and residual_grad"):
        k.bn_bwd_apply(y, y, bn, grad, residual=y, residual_bn=bn, need_residual=True)
    monkeypatch.setattr("fastres.kernels.triton._common.INTERPRETED", False)
    with pytest.raises(ValueError, match="bn_act: y is on cpu, Triton kernels need CUDA"):
        k.bn_act(y.cpu(), bn.cpu())


# The reference


def bn_of(y, weight, bias, running=None, momentum=0.1, eps=1e-5):
    return reference.bn_finalize(reference.channel_stats(y), weight, bias, *(running or (None,) * 3), momentum, eps)


def nchw(t):
    return t.permute(0, 3, 1, 2)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("constant", [False, True], ids=["batch statistics", "constant statistics"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    "mask, shortcut",
    # With a shortcut the ReLU's input is not scale*y + shift: the mask comes from its output.
    [*itertools.product(["none", "output"], ["none", "identity", "projected"]), ("input", "none")],
)
def test_reference_against_autograd(mask, shortcut, affine, constant):
    torch.manual_seed(0)
    shape, c = (3, 5, 7, 6), 6
    y, residual, g = random(*shape).requires_grad_(), random(*shape).requires_grad_(), random(*shape)
    weights = [random(c).requires_grad_() if affine else None for _ in range(4)]
    running = [random(c), random(c).exp(), random(c), random(c).exp()]

    def stock_bn(t, index):
        weight, bias = weights[2 * index : 2 * index + 2]
        statistics = running[2 * index : 2 * index + 2] if constant else (None, None)
        return F.batch_norm(nchw(t), *statistics, weight, bias, training=not constant).permute(0, 2, 3, 1)

    z = stock_bn(y, 0)
    if shortcut != "none":
        z = z + (residual if shortcut == "identity" else stock_bn(residual, 1))
    expected_out = z if mask == "none" else z.relu()
    leaves = [y, *([residual] if shortcut != "none" else []), *(w for w in weights if w is not None)]
    expected = dict(zip(map(id, leaves), torch.autograd.grad(expected_out, leaves, g, allow_unused=True), strict=True))

    with torch.no_grad():

        def bn_vectors(t, index):
            weight, bias = weights[2 * index : 2 * index + 2]
            if constant:
                return reference.bn_constants(*running[2 * index : 2 * index + 2], weight, bias, 1e-5, t.dtype)
            return bn_of(t, weight, bias)

        bn = bn_vectors(y, 0)
        residual_bn = bn_vectors(residual, 1) if shortcut == "projected" else None
        out = reference.bn_act(y, bn, None if shortcut == "none" else residual, residual_bn, relu=mask != "none")
        assert relative_error(out, expected_out) < EXACT
        through = {"none": {}, "output": {"out": out}, "input": {"relu": True}}[mask]
        branch = {} if residual_bn is None else {"residual": residual, "residual_bn": residual_bn}
        sums, residual_sums = reference.bn_bwd_reduce(g, y, bn, **through, **branch)
        count = None if constant else 3 * 5 * 7
        grad = reference.bn_bwd_finalize(sums, bn, count)
        if residual_bn is None:
            assert residual_sums is None
        else:
            branch["residual_grad"] = reference.bn_bwd_finalize(residual_sums, residual_bn, count)
        if constant:
            branch.pop("residual", None)
        needs_y = not constant or mask == "input"
        dy, dresidual = reference.bn_bwd_apply(
            g, y if needs_y else None, bn, grad, **through, **branch, need_residual=shortcut != "none"
        )
    results = {id(y): dy, id(residual): dresidual, id(weights[0]): grad[0], id(weights[1]): grad[1]}
    if residual_bn is not None:
        results |= {id(weights[2]): branch["residual_grad"][0], id(weights[3]): branch["residual_grad"][1]}
    for leaf, value in expected.items():
        if value is not None:
            assert relative_error(results[leaf], value) < EXACT
    assert (dresidual is None) == (shortcut == "none")


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None], ids=str)
def test_reference_running_statistics_over_three_steps(momentum, affine):
    torch.manual_seed(1)
    stock = torch.nn.BatchNorm2d(5, momentum=momentum, affine=affine, dtype=torch.float64)
    running = [t.clone() for t in (stock.running_mean, stock.running_var, stock.num_batches_tracked)]
    for _ in range(3):
        y = random(2, 3, 5, 5) * 2 + 1
        expected = stock(nchw(y))
        bn = bn_of(y, stock.weight, stock.bias, running, momentum)
        assert relative_error(reference.bn_act(y, bn, relu=False), expected.permute(0, 2, 3, 1)) < EXACT
    for ours, expected in zip(running, stock.buffers(), strict=True):
        assert ours.dtype == expected.dtype and relative_error(ours, expected) < EXACT


def test_reference_leaves_absent_running_statistics_alone():
    y = random(2, 3, 3, 4)
    running_mean, running_var = torch.zeros(4), torch.ones(4)
    reference.bn_finalize(reference.channel_stats(y), None, None, running_mean, running_var, None, 0.1, 1e-5)
    expected = nchw(y).mean((0, 2, 3)), nchw(y).var((0, 2, 3))
    torch.testing.assert_close(running_mean, 0.1 * expected[0].float())
    torch.testing.assert_close(running_var, 0.9 + 0.1 * expected[1].float())


@pytest.mark.parametrize("groups", [(30,), (1, 29), (7, 7, 16), (2, 13, 1, 14)], ids=str)
def test_reference_merges_partials_of_unequal_counts(groups):
    y = random(30, 1, 1, 6) * random(6).exp() + 10
    parts = [reference.channel_stats(part) for part in y.split(groups)]
    stats = ChannelStats(*(torch.cat(field) for field in zip(*parts, strict=True)))
    assert (
        relative_error(reference.bn_finalize(stats, None, None, None, None, None, 0.1, 1e-5), bn_of(y, None, None))
        < EXACT
    )


def test_reference_merges_partials_at_a_large_mean_in_float32():
    y = (random(4096, 1, 1, 3) + 1000).float()
    parts = [reference.channel_stats(part) for part in y.split(100)]
    stats = ChannelStats(*(torch.cat(field) for field in zip(*parts, strict=True)))
    bn = reference.bn_finalize(stats, None, None, None, None, None, 0.1, 0.0)
    exact = bn_of(y.double(), None, None, eps=0.0)
    assert relative_error(bn[0], exact[0]) < 1e-6 and relative_error(bn[1], exact[1]) < 1e-5


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_a_constant_channel_by_the_library(dtype, device):
    y = torch.randn(2, 5, 7, 3, device=device).to(dtype)
    y[..., 1] = 3.0
    count, mean, m2 = library.channel_stats(y)
    assert m2[:, 1].sum() == 0 and torch.allclose(mean[:, 1], mean.new_tensor(3.0))
    assert torch.isfinite(mean).all() and torch.isfinite(m2).all() and (m2[:, [0, 2]] > 0).all()
