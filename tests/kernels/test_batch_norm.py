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
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SHAPES = [
    (2, 7, 11, 1),
    (3, 5, 7, 3),
    (2, 9, 7, 24),
    (1, 5, 9, 27),
    (3, 7, 7, 40),
    (1, 13, 5, 80),
    (2, 8, 8, 64),
    (0, 4, 4, 24),
    (1, 1, 1, 16),
]
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


def statistics_bounds(momentum):
    """Bounds of the errors of statistics from float64 inputs, whatever the partials: n roundings of deviations that are
    at most the channel's spread, one of each group's mean and one of the result (Chan, Golub & LeVeque, 1983).
    """

    def bounds(t):
        y, unit = t["y"].flatten(0, 2), 2.0**-24
        rows, largest, spread = len(y), y.abs().amax(0), y.amax(0) - y.amin(0)
        exact = CASES[f"statistics, momentum {momentum}"].run(reference, cases.copied(t))
        mean = 2 * unit * ((rows + 4) * spread + largest)
        var = 2 * unit * spread * (3 * (rows + 4) * spread + largest)
        rstd = exact["rstd"] * (var / (exact["var"] + 1e-5) + 4 * unit)
        scale = t["weight"] * rstd + unit * exact["scale"]
        products = (exact["mean"] * exact["scale"]).abs()
        shift = exact["mean"].abs() * scale + exact["scale"] * mean + 2 * unit * (products + t["bias"].abs())
        factor = 1 / exact["num_batches_tracked"] if momentum is None else momentum
        running = {"num_batches_tracked": 0}
        for name, batch, error in (
            ("running_mean", exact["mean"], mean),
            ("running_var", exact["var"] * rows / (rows - 1), var * rows / (rows - 1)),
        ):
            running[name] = factor * error + 3 * unit * (t[name].abs() + batch.abs())
        return {"mean": mean, "var": var, "rstd": rstd, "scale": scale, "shift": shift} | running

    return bounds


def bounds_of(name):
    """What `compare` takes for a case."""
    if name.startswith("statistics"):
        return statistics_bounds(0.1 if name.endswith("0.1") else None)
    return sum_bounds if name == "batch norm backward" or "bn_bwd_reduce" in name or name == "bn_bwd_mask" else None


# Triton's kernels


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, shape",
    [
        (name, shape)
        for name in CASES
        for shape in SHAPES
        # Statistics of fewer than two rows are NaN: they have a test of their own.
        if shape[:3].count(1) < 3 and 0 not in shape or not name.startswith("statistics")
    ],
    ids=str,
)
def test_triton_computes_what_the_reference_defines(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, sizes(shape), bounds_of(name))


@pytest.mark.parametrize("wanted", static_checks.requests("batch_norm"), ids=str)
def test_every_configuration_compiles_and_computes_what_the_reference_defines(wanted, check_configuration):
    check_configuration("batch_norm", wanted, bounds_of(wanted.case))


@pytest.fixture
def few_programs(triton_kernels, monkeypatch):
    """Grids of a few programs, so that each loops over several tiles of a tensor that the interpreter can bear."""
    from fastres.kernels.triton import batch_norm

    for part, configs in batch_norm.CONFIGS.items():
        few = {name: config._replace(programs=3) for name, config in configs.items()}
        monkeypatch.setitem(batch_norm.CONFIGS, part, few)


@pytest.mark.parametrize("name", CASES)
def test_programs_that_take_several_tiles(name, compare, poisoned, few_programs):
    compare(CASES[name], torch.float32, sizes((3, 7, 11, 64)), bounds_of(name))


# Not of the whole backward: there c, in float32, rounds b*mean, which is large beside the dy that it is a part of.
@pytest.mark.parametrize(
    "name",
    [name for name in CASES if not any(part in name for part in ("constant", "frozen", "backward", "add_masked"))],
)
def test_mean_of_a_thousand_standard_deviations(name, k, device, few_programs):
    # A group's mean in float32 is 3e-5 off: statistics need groups of some hundred rows, as a GPU's programs take.
    shape = (4, 24, 24, 16) if name.startswith("statistics") else (2, 9, 7, 24)
    t = inputs(name, torch.float32, device, shape, mean=1000.0)
    exact, ours = CASES[name].run(reference, cases.exact_inputs(t)), CASES[name].run(k, cases.copied(t))
    stock = CASES[name].stock(cases.copied(t))
    for result in exact:
        assert_three_way(result, ours[result], stock[result], exact[result].double(), torch.float32)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nan_and_infinity_come_out_where_the_reference_has_them(name, dtype, k, device):
    t = inputs(name, dtype, device, (2, 5, 7, 24))
    # One special value per operand and channel, so that each is seen alone.
    operands = [value for key, value in t.items() if key in ("g", "y", "out", "residual") and value is not None]
    for channel, (operand, special) in enumerate(
        itertools.product(operands, (float("nan"), float("inf"), -float("inf")))
    ):
        operand[1, 2, 3, channel] = special
    expected, ours = CASES[name].run(reference, cases.copied(t)), CASES[name].run(k, cases.copied(t))
    expected.pop("num_batches_tracked", None)
    assert not any(value.isfinite().all() for value in expected.values())
    for result, value in expected.items():
        if name.startswith("statistics"):
            # Whether a mean is NaN or infinite depends on the order of additions.
            assert torch.equal(ours[result].isfinite(), value.isfinite()), result
            continue
        torch.testing.assert_close(ours[result], value, equal_nan=True, rtol=1e-2, atol=1e-2)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours[result]), kind(value)), f"{result}: {kind.__name__}"


@pytest.mark.parametrize("name", CASES)
def test_same_bits_twice_and_inputs_unwritten(name, k, device, few_programs):
    before = inputs(name, torch.float16, device, (2, 9, 7, 80))
    t = cases.copied(before)
    first, second = CASES[name].run(k, t), CASES[name].run(k, cases.copied(before))
    for result in first:
        assert torch.equal(first[result], second[result])
    for key in before.keys() - first.keys():  # Running statistics are inputs and results.
        assert torch.equal(t[key], before[key]) if isinstance(before[key], torch.Tensor) else t[key] is before[key]


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


def test_a_constant_channel_has_no_deviations(k, device, few_programs):
    torch.manual_seed(0)
    y = torch.randn(3, 7, 11, 24, device=device)
    constants = torch.tensor([3.3, -1e4, 1e-6, 1e30], device=device)
    y[..., :4] = constants
    count, mean, m2 = k.channel_stats(y)
    assert not m2[:, :4].any() and (mean[:, :4] == constants).all() and (m2[:, 4:] > 0).all()
    bn = k.bn_finalize(ChannelStats(count, mean, m2), None, None, None, None, None, 0.1, 1e-5)
    assert (bn[0, :4] == constants).all()
    torch.testing.assert_close(bn[1, :4], torch.full_like(constants, 1e-5).rsqrt(), rtol=1e-6, atol=0)


def test_partials_count_every_row_once(k, device, few_programs, poisoned):
    torch.manual_seed(0)
    y = torch.randn(3, 7, 11, 40, device=device)
    count, mean, m2 = k.channel_stats(y)
    assert count.sum() == 231 and count.dtype == mean.dtype == m2.dtype == torch.float32
    assert len(count) == len(mean) == len(m2) > 1 and count.unique().numel() > 1


def test_the_pass_that_reads_first_begins_with_the_last_rows(k, device):
    t = inputs("bn_bwd_reduce, mask none", torch.float32, device, (1, 5, 29, 24))
    g, y = t["g"].flatten(0, 2).double(), t["y"].flatten(0, 2).double()
    count, mean, _ = k.channel_stats(t["y"])
    sums, _ = k.bn_bwd_reduce(**t)
    # A tile per program, of which the last rows' is cut: 145 = 4*32 + 17 rows.
    assert count.tolist() == [17, 32, 32, 32, 32] and len(sums) == 5
    torch.testing.assert_close(mean[0], y[-17:].mean(0).float())
    torch.testing.assert_close(sums[0, 0], g[-17:].sum(0).float())
    torch.testing.assert_close(sums[-1, 0], g[:32].sum(0).float())


@pytest.mark.parametrize("rows", [0, 1])
def test_statistics_of_one_row_and_of_none(rows, k, device, poisoned):
    t = inputs("statistics, momentum 0.1", torch.float32, device, (rows, 1, 1, 24))
    stats = k.channel_stats(t["y"])
    assert (stats.count == rows).all() and not stats.m2.any()
    assert torch.equal(stats.mean, t["y"].sum((0, 1, 2))[None])
    expected = CASES["statistics, momentum 0.1"].run(reference, cases.copied(t))
    ours = CASES["statistics, momentum 0.1"].run(k, cases.copied(t))
    assert expected["running_var"].isnan().all() and expected["scale"].isnan().all() == (rows == 0)
    for result in expected.keys() - ({"mean", "running_mean"} if rows == 0 else set()):
        torch.testing.assert_close(ours[result], expected[result], equal_nan=True, msg=result)


@pytest.mark.parametrize("groups", [(231,), (1, 230), (40,) * 5 + (31,), (2,) * 115 + (1,), (1,) * 231], ids=len)
def test_partials_of_any_namespace_and_size_are_merged(groups, k, device, poisoned):
    torch.manual_seed(0)
    y = torch.randn(231, 1, 1, 24, device=device) * 3 + 1000
    parts = [reference.channel_stats(part) for part in y.split(groups)]
    stats = ChannelStats(*(torch.cat(field) for field in zip(*parts, strict=True)))
    # Programs that had no rows take no part, wherever they stand.
    for at in (0, len(groups)):
        empty = (stats.count.new_zeros(1), stats.mean.new_zeros(1, 24), stats.m2.new_zeros(1, 24))
        ends = (slice(0, at), slice(at, None))
        with_empty = ChannelStats(*(torch.cat([f[ends[0]], e, f[ends[1]]]) for f, e in zip(stats, empty, strict=True)))
        for given in (stats, with_empty):
            arguments = None, None, None, None, None, 0.1, 1e-5
            exact = reference.bn_finalize(ChannelStats(*(f.double() for f in given)), *arguments)
            ours = k.bn_finalize(given, *arguments)
            # About the mean of the first group, where it has one.
            assert relative_error(ours[0], exact[0]) < (2.0**-22 if given.count[0] == 0 else 2.0**-24)
            assert relative_error(ours[1], exact[1]) < 2.0**-20


def test_counts_that_float32_does_not_resolve(k, device):
    count = torch.tensor([2.0**31, 2.0**24 + 2], device=device)
    m2 = torch.ones(2, 16, device=device) * count[:, None]
    running = torch.zeros(16, device=device), torch.zeros(16, device=device)
    bn = k.bn_finalize(ChannelStats(count, torch.ones_like(m2), m2), None, None, *running, None, 1.0, 0.0)
    assert (bn[:2] == 1).all() and (running[0] == 1).all()
    torch.testing.assert_close(running[1], torch.ones_like(running[1]), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None], ids=str)
def test_running_statistics_over_four_steps(momentum, k, device):
    torch.manual_seed(0)

    def running(dtype):
        zeros = torch.zeros(24, dtype=dtype, device=device)
        return [zeros, zeros + 1, torch.tensor(0, device=device)]

    ours, stock, exact = running(torch.float32), running(torch.float32), running(torch.float64)
    for _ in range(4):
        stats = k.channel_stats(torch.randn(3, 5, 7, 24, device=device) * 2 + 1)
        k.bn_finalize(stats, None, None, *ours, momentum, 1e-5)
        reference.bn_finalize(stats, None, None, *stock, momentum, 1e-5)
        stats = ChannelStats(*(field.double() for field in stats))
        reference.bn_finalize(stats, None, None, *exact, momentum, 1e-5)
    assert ours[2] == 4 and ours[2].dtype == torch.int64
    for name, *values in zip(("running_mean", "running_var"), ours, stock, exact, strict=False):
        assert values[0].dtype == torch.float32
        assert_three_way(name, *values, torch.float32)


@pytest.mark.parametrize("namespace", ["reference", "triton"])
@pytest.mark.parametrize("momentum", [1.0, None], ids=str)
def test_a_batch_that_replaces_running_statistics_keeps_its_digits(momentum, namespace, k, device):
    """As the first one of a cumulative average does, however small its values are beside the old ones."""
    small = torch.linspace(1e-6, 1e-5, 24, device=device)
    stats = ChannelStats(torch.tensor([100.0], device=device), small[None], 100 * small[None])
    running = torch.ones(24, device=device), torch.ones(24, device=device), torch.tensor(0, device=device)
    bn_finalize = {"reference": reference, "triton": k}[namespace].bn_finalize
    bn_finalize(stats, None, None, *running, momentum, 1e-5)
    for found, expected in zip(running, (small, 100 * small / 99), strict=False):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_and_running_statistics_of_16_bits(dtype, k, device):
    t = inputs("statistics, momentum 0.1", torch.float32, device, (2, 9, 7, 27))
    for name in ("weight", "bias", "running_mean", "running_var"):
        t[name] = t[name].to(dtype)
    exact = CASES["statistics, momentum 0.1"].run(reference, cases.exact_inputs(t))
    ours = CASES["statistics, momentum 0.1"].run(k, cases.copied(t))
    wide = statistics_bounds(0.1)(cases.exact_inputs(t))
    for result in ("rstd", "scale", "shift"):
        assert ours[result].dtype == torch.float32
        assert ((ours[result] - exact[result]).abs() <= wide[result]).all()
    # Rounded once, on store; Triton's interpreter cuts bfloat16 off.
    unit = torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 and device.type == "cpu" else 0.5)
    for result in ("running_mean", "running_var"):
        assert ours[result].dtype == dtype
        largest = exact[result].abs().clamp(min=torch.finfo(dtype).tiny) * 1.001
        assert ((ours[result] - exact[result]).abs() <= unit * largest + wide[result]).all()


def test_absent_parameters_and_running_statistics(k, device):
    torch.manual_seed(0)
    y = torch.randn(2, 9, 7, 24, device=device)
    stats = k.channel_stats(y)
    tracked = torch.tensor(5, device=device)
    bn = k.bn_finalize(stats, None, None, None, None, tracked, None, 1e-5)
    assert tracked == 5 and torch.equal(bn[2], bn[1]) and torch.equal(bn[3], -bn[0] * bn[1])
    ones, zeros = torch.ones(24, device=device), torch.zeros(24, device=device)
    assert torch.equal(bn, k.bn_finalize(stats, ones, zeros, None, None, None, 0.1, 1e-5))
    running = zeros.clone(), ones.clone()
    k.bn_finalize(stats, None, None, *running, None, 0.1, 1e-5)
    assert (running[0] != 0).all() and (running[1] != 1).all()
    constants = k.bn_constants(*running, None, None, 1e-5, torch.float16)
    assert torch.equal(constants, k.bn_constants(*running, ones, zeros, 1e-5, torch.float16))
    assert torch.equal(constants[0], running[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 24, 27, 200])
def test_constants_of_any_dtype(dtype, channels, k, device, poisoned):
    t = inputs("bn_constants", torch.float32, device, (1, 1, 1, channels))
    vectors = [t[name].to(dtype) for name in ("running_mean", "running_var", "weight", "bias")]
    ours = k.bn_constants(*vectors, 1e-5, torch.float16)
    stock = reference.bn_constants(*vectors, 1e-5, torch.float16)
    exact = reference.bn_constants(*(v.double() for v in vectors), 1e-5, torch.float64)
    assert_three_way("bn", ours, stock, exact, torch.float32)


@pytest.mark.parametrize("channels", [1, 3, 24, 27, 80])
@pytest.mark.parametrize("groups", [1, 5, 300])
@pytest.mark.parametrize("count", [12544, 3 * 2**31, None])
def test_backward_vectors(count, groups, channels, k, device, poisoned):
    torch.manual_seed(3)
    sums = torch.randn(groups, 2, channels, device=device)
    bn = torch.randn(4, channels, device=device)
    ours = k.bn_bwd_finalize(sums, bn, count)
    exact = reference.bn_bwd_finalize(sums.double(), bn.double(), count)
    unit = (groups + 4) * 2.0**-24
    terms = sums.double().abs().sum(0)
    mean, rstd = bn[:2].double().abs()
    errors = torch.stack([rstd * terms[1], terms[0], rstd**2 * terms[1], mean * rstd**2 * terms[1] + terms[0]])
    errors[2:] *= 0 if count is None else 1 / count
    assert ours.dtype == torch.float32 and ((ours - exact).abs() <= unit * errors).all()


def test_small_kernels_take_one_launch_and_read_no_value(triton_kernels, monkeypatch):
    """On the meta device there are no values: whatever asked for one would raise."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches = []
    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", lambda kernel, *args, **kwargs: launches.append(kernel.__name__))
    k, f = triton_kernels, cases.Maker(torch.bfloat16, "meta")
    y, vector = f.activation(256, 14, 14, 1024), f.vector(1024)
    tracked = torch.tensor(0, device="meta")
    stats = k.channel_stats(y)
    bn = k.bn_finalize(stats, vector, vector, vector, vector, tracked, 0.1, 1e-5)
    k.bn_finalize(stats, vector, vector, vector, vector, tracked, None, 1e-5)
    k.bn_constants(vector, vector, vector, vector, 1e-5, y.dtype)
    sums, _ = k.bn_bwd_reduce(y, y, bn, relu=True)
    k.bn_bwd_apply(y, y, bn, k.bn_bwd_finalize(sums, bn, 50176), relu=True)
    assert launches == [
        "_channel_stats_kernel",
        "_bn_finalize_kernel",
        "_bn_finalize_kernel",
        "_bn_constants_kernel",
        "_bn_bwd_reduce_kernel",
        "_bn_bwd_finalize_kernel",
        "_bn_bwd_apply_kernel",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: nothing waits on a CPU")
def test_nothing_waits_for_the_device(k, device):
    ts = [inputs(name, torch.bfloat16, device, (2, 9, 7, 24)) for name in CASES]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, t in zip(CASES, ts, strict=True):
            CASES[name].run(k, t)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_blocks_of_rows_just_below_2_to_the_31(triton_kernels):
    from fastres.kernels.triton.batch_norm import _blocks

    # Its arithmetic on a 32-bit tensor, which wraps as a kernel's does.
    rows = torch.tensor([2**31 - 1, 2**31 - 32, 2**31 - 33], dtype=torch.int32)
    assert _blocks.fn(rows, 32).tolist() == [2**26, 2**26 - 1, 2**26 - 1]


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
    with pytest.raises(ValueError, match="bn_bwd_apply: residual needs residual_bn"):
        k.bn_bwd_apply(y, y, bn, grad, residual=y, residual_grad=grad, need_residual=True)
    stats, vector, tracked = k.channel_stats(y), f.vector(16), torch.tensor(0, device=device)
    with pytest.raises(TypeError, match="channel_stats: y is torch.float64.*backend='reference'"):
        k.channel_stats(y.double())
    for wrong, message in (
        ({"stats": stats._replace(count=stats.count.double())}, r"stats.count must be dense float32"),
        ({"stats": stats._replace(m2=stats.m2[:, :8])}, r"stats.m2 must be dense float32 \[\d+, 16\]"),
        ({"weight": vector[:8]}, r"weight must be dense float32 or float16 or bfloat16 \[16\]"),
        ({"bias": vector.double()}, r"bias must be dense .* is torch.float64"),
        ({"running_mean": vector.repeat(2)[::2]}, r"running_mean must be dense .* strides \(2,\)"),
        ({"running_var": vector.to("meta")}, r"running_var must be dense .* on meta"),
        ({"num_batches_tracked": tracked.float()}, r"num_batches_tracked must be dense int64 \[\]"),
        ({"running_var": None}, "running_mean and running_var belong together: pass both, or neither"),
        ({"num_batches_tracked": None, "momentum": None}, "momentum=None needs num_batches_tracked: pass it, or a mom"),
    ):
        right = {"stats": stats, "running_mean": vector, "running_var": vector, "num_batches_tracked": tracked}
        with pytest.raises(ValueError, match=f"bn_finalize: {message}"):
            k.bn_finalize(**({"weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5} | right | wrong))
    with pytest.raises(TypeError, match="bn_constants: dtype is torch.float64.*backend='reference'"):
        k.bn_constants(vector, vector, None, None, 1e-5, torch.float64)
    with pytest.raises(ValueError, match="bn_constants: running_var must be dense"):
        k.bn_constants(vector, vector[:8], None, None, 1e-5, torch.float32)
    with pytest.raises(ValueError, match=r"bn_bwd_finalize: bn must be dense float32 \[4, 16\]"):
        k.bn_bwd_finalize(k.bn_bwd_reduce(y, y, bn)[0], bn[:, :8], 32)
    with pytest.raises(ValueError, match=r"bn_bwd_finalize: sums must be dense float32 \[1, 2, 16\]"):
        k.bn_bwd_finalize(torch.zeros(1, 3, 16, device=device), bn, 32)
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
