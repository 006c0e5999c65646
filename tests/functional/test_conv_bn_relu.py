"""Convolution, batch norm and ReLU: which kernels each shape of conv takes, and the conv's bias, in float64."""

import copy

import pytest
import torch
from torch import nn

from fastres import cost, functional, plan
from fastres.functional import BatchNormParams

GEOMETRIES = {
    "1x1": ({"kernel": 1, "padding": 0}, "conv1x1"),
    "1x1, stride 2": ({"kernel": 1, "padding": 0, "stride": 2}, "conv1x1"),
    "1x1, dilation, which means nothing": ({"kernel": 1, "padding": 0, "dilation": 3}, "conv1x1"),
    "1x1, other strides": ({"kernel": 1, "padding": 0, "stride": (2, 1)}, "conv2d"),
    "1x1, padded": ({"kernel": 1, "padding": 1}, "conv2d"),
    "1x1, grouped": ({"kernel": 1, "padding": 0, "groups": 2}, "conv2d"),
    "3x3": ({}, "conv3x3"),
    "3x3, stride 2": ({"stride": 2}, "conv3x3"),
    "3x3, dilation 2": ({"padding": 2, "dilation": 2}, "conv3x3"),
    "3x3, grouped, stride 2": ({"groups": 2, "stride": 2}, "conv3x3"),
    "3x3, not padded": ({"padding": 0}, "conv2d"),
    "3x3, padding that is not the dilation": ({"padding": 1, "dilation": 2}, "conv2d"),
    "3x3, other strides": ({"stride": (1, 2)}, "conv2d"),
    "3x3, other dilations": ({"padding": (1, 2), "dilation": (1, 2)}, "conv2d"),
    "5x5": ({"kernel": 5, "padding": 2}, "conv2d"),
    "7x7, stride 2": ({"kernel": 7, "padding": 3, "stride": 2}, "conv2d"),
    "1x3": ({"kernel": (1, 3), "padding": (0, 1)}, "conv2d"),
    "5x2, uneven all over": ({"kernel": (5, 2), "padding": (1, 0), "stride": (1, 2), "dilation": (1, 2)}, "conv2d"),
}


@pytest.fixture
def calls():
    """The names of the kernels that run, in order."""
    names = []

    def recorded(name, launcher):
        def call(*args, **kwargs):
            names.append(name)
            return launcher(*args, **kwargs)

        return call

    def wrap(k):
        return type(k)(**vars(k) | {name: recorded(name, value) for name, value in plan.launchers(k).items()})

    with plan.wrapping(wrap):
        yield names


def assert_close(name, ours, stock):
    assert ours.shape == stock.shape and ours.dtype == stock.dtype, name
    # The gradient of a bias in front of batch statistics is what rounding leaves of a sum of larger terms.
    scale = stock.double().norm().clamp(min=1 if name == "convs.0.bias" else 1e-3)
    assert (ours - stock).double().norm() <= 1e-10 * scale, name


def assert_same(results, batch_stats=True):
    (stock_out, stock_grads, stock_state), (out, grads, state) = results
    assert_close("output", out, stock_out)
    for name in stock_grads:
        assert_close(name, grads[name], stock_grads[name])
    if "convs.0.bias" in grads and batch_stats:
        assert grads["convs.0.bias"].eq(0).all()
    for name in stock_state:
        assert_close(name, state[name], stock_state[name])


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry_matches_stock_by_the_kernels_of_its_shape(geometry, bias, relu, make_unit, run_both, calls):
    options, family = GEOMETRIES[geometry]
    unit, x = make_unit("conv3x3-bn-relu", bias=bias, relu=relu, **options)
    for training in (True, False):
        calls.clear()
        assert_same(run_both(unit.train(training), x), training)
        # Of 1x1 and 3x3 the statistics come with the conv.
        stats = ["channel_stats"] if training and family == "conv2d" else []
        statistics = "bn_finalize" if training else "bn_constants"
        assert calls == [
            family, *stats, statistics, "bn_act",
            "bn_bwd_reduce", "bn_bwd_finalize", "bn_bwd_apply", f"{family}_wgrad", f"{family}_dgrad",
        ]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradcheck_of_every_geometry(geometry, training, make_unit):
    unit, x = make_unit("conv3x3-bn-relu", size=(2, 6, 5), bias=True, **GEOMETRIES[geometry][0])
    unit.train(training)
    conv, bn = unit.convs[0], unit.bns[0]
    options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}

    def function(x, weight, bias, gamma, beta):
        state = bn.running_mean, bn.running_var, None
        params = BatchNormParams(gamma, beta, *state, training, 0.0, bn.eps)  # the running statistics stay
        return functional.conv_bn_relu(x, weight, params, conv_bias=bias, **options)

    inputs = x.requires_grad_(), conv.weight, conv.bias, bn.weight, bn.bias
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 1, 0.0, None])
def test_running_statistics_see_the_bias(momentum, make_unit):
    states = []
    for method in ("stock", "fused"):
        unit, x = make_unit("conv3x3-bn-relu", bias=True, momentum=momentum)
        nn.init.normal_(unit.convs[0].bias, 3)
        for step in range(3):
            getattr(unit, method)(x * (step + 1) + step)
        states.append(unit.state_dict())
    for name in states[0]:
        assert_close(name, states[1][name], states[0][name])


def test_a_share_of_one_replaces_a_far_larger_running_mean(make_unit):
    unit, x = make_unit("conv3x3-bn-relu", bias=True, momentum=1.0)
    unit.bns[0].running_mean.fill_(1e12)
    unit.fused(x)
    assert_close("running_mean", unit.bns[0].running_mean, unit.convs[0](x).mean((0, 2, 3)))


def test_a_batch_norm_without_running_statistics_ignores_the_bias(make_unit, run_both):
    unit, x = make_unit("conv3x3-bn-relu", bias=True, track_running_stats=False)
    assert_same(run_both(unit, x))
    assert_same(run_both(unit.eval(), x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_large_bias_costs_digits_of_the_output(training, make_unit):
    """The bias is added to no tensor: in training nothing of the output depends on it."""
    unit, x = make_unit("conv3x3-bn-relu", dtype=torch.float32, bias=True)
    unit.train(training)
    other = copy.deepcopy(unit)
    nn.init.constant_(other.convs[0].bias, 2.0**20)
    if not training:
        other.bns[0].running_mean += 2.0**20
        unit.bns[0].running_mean.copy_(other.bns[0].running_mean - 2.0**20)  # as it was rounded
        nn.init.zeros_(unit.convs[0].bias)
    assert torch.equal(unit.fused(x), other.fused(x))


def test_the_running_mean_takes_a_bfloat16_bias_without_rounding(make_unit):
    for momentum in (0.1, None):
        unit, x = make_unit("conv3x3-bn-relu", bias=True, dtype=torch.float32, momentum=momentum)
        bn, conv = unit.bns[0], unit.convs[0].bfloat16()
        nn.init.uniform_(conv.bias, 1, 2)
        bn.num_batches_tracked.fill_(2)
        before = bn.running_mean.double()
        out = unit.fused(x.bfloat16())
        out.float().sum().backward()
        assert out.dtype == conv.bias.grad.dtype == torch.bfloat16 and bn.running_mean.dtype == torch.float32
        share = momentum or 1 / 3
        y = nn.functional.conv2d(x.bfloat16().double(), conv.weight.double(), conv.bias.double(), padding=1)
        exact = (1 - share) * before + share * y.mean((0, 2, 3))
        # The mean of 70 values below 1 that are rounded to bfloat16; one rounding of the bias's share would be more.
        assert ((bn.running_mean - exact).abs() < share * 5e-4).all()


def gradients(unit, x, wanted):
    for name, parameter in unit.named_parameters():
        parameter.requires_grad_(name in wanted)
    unit.fused(x).square().sum().backward()


def test_backward_of_a_bias_alone_runs_what_it_needs(make_unit, calls):
    unit, x = make_unit("conv3x3-bn-relu", bias=True)
    gradients(unit, x, ["convs.0.bias"])
    assert calls == ["conv3x3", "bn_finalize", "bn_act"]
    assert unit.convs[0].bias.grad.eq(0).all()
    calls.clear()
    gradients(unit.eval(), x, ["convs.0.bias"])
    assert calls[3:] == ["bn_bwd_reduce", "bn_bwd_finalize"]
    assert unit.convs[0].bias.grad.ne(0).any()


def test_a_bias_of_another_shape_is_refused(make_unit):
    unit, x = make_unit("conv3x3-bn-relu", bias=True)
    unit.convs[0].bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"conv_bias must be \[4\], as the weight says, is \(1,\)"):
        unit.fused(x)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_gpu_runs_the_kernels_of_the_shape_and_reads_no_value(momentum):
    """On the meta device, where a read of a value raises."""
    pytest.importorskip("triton")
    layers = []
    for kernel in (3, 1, 5):
        conv = nn.Conv2d(16, 16, kernel, padding=kernel // 2)
        layers += [conv, nn.BatchNorm2d(16, momentum=momentum), nn.ReLU()]
    steps = cost.training_step(nn.Sequential(*layers), (2, 16, 8, 8))
    ran = [step.kernel for step in steps if step.direction == "forward"]
    assert [kernel for kernel in ran if kernel in ("conv1x1", "conv2d", "conv3x3")] == ["conv3x3", "conv1x1", "conv2d"]
    backends = {step.kernel: step.backend for step in steps}
    assert backends["conv1x1"] in ("triton", "library") and backends["bn_act"] == "triton"
