"""The units as torch operators: opcheck, torch.compile, autocast, low precision, saved bytes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastres
from fastres.kernels import library, reference
from fastres.memory import saved_bytes


class RecordFastresCalls(TorchDispatchMode):
    """Collects the arguments of every fastres operator that runs."""

    def __init__(self):
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastres":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


BOTTLENECK, BASIC = torch.ops.fastres.bottleneck_bwd.default, torch.ops.fastres.basic_block_bwd.default


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_opcheck(unit_name, make_unit, train):
    unit, x = make_unit(unit_name, dtype=torch.float32)
    unit.train(train)
    with RecordFastresCalls() as record:
        unit.fused(x.requires_grad_()).sum().backward()
    calls = record.calls
    if unit_name.startswith("stage"):
        # Those that a block by itself does not make: of a gradient that is masked, or that the block in front wants so.
        calls = [call for call in calls if call[0] in (BOTTLENECK, BASIC) and (call[1][3] is None or call[1][7])]
        assert calls
    else:
        assert len(calls) == 2
    for operator, args in calls:
        args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
        # Autograd stands outside the operators, in an autograd.Function: the registration test does not apply.
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, args, test_utils=tests)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiles_as_one_graph_and_matches_eager(single_unit_name, make_unit, train):
    torch._dynamo.reset()
    unit, x = make_unit(single_unit_name)
    unit.train(train)
    other = copy.deepcopy(unit)
    function = torch.compile(other.fused, fullgraph=True, backend="aot_eager")
    for batch in (x, torch.cat([x, x.flip(0)])):
        eager_x, compiled_x = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        compiled = function(compiled_x)
        compiled.square().sum().backward()
        eager = unit.fused(eager_x)
        eager.square().sum().backward()
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(compiled_x.grad, eager_x.grad, rtol=1e-12, atol=1e-12)
    for name, value in unit.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)
    for ours, theirs in zip(other.parameters(), unit.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_inductor_matches_eager(make_unit):
    torch._dynamo.reset()
    unit, x = make_unit("bottleneck-projection-stride2")
    other = copy.deepcopy(unit)
    function = torch.compile(lambda x: torch.sigmoid(other.fused(x * 2)), fullgraph=True)
    compiled = function(x.requires_grad_())
    grads = torch.autograd.grad(compiled.sum(), [x, *other.parameters()])
    eager = torch.sigmoid(unit.fused(x * 2))
    for ours, theirs in zip(grads, torch.autograd.grad(eager.sum(), [x, *unit.parameters()]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.bns[2].running_var, unit.bns[2].running_var)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="strides of real results on a CUDA device")
@pytest.mark.parametrize("name", ["bottleneck-projection-stride2", "basic", "conv3x3-bn-relu", "stem", "projection"])
def test_inductor_matches_eager_on_a_gpu(name, make_unit):
    torch._dynamo.reset()
    unit, x = make_unit(name, dtype=torch.bfloat16, scale=8)
    unit = unit.to("cuda", memory_format=torch.channels_last)
    other = copy.deepcopy(unit)
    x = x.to("cuda").requires_grad_()
    compiled = torch.compile(lambda x: torch.sigmoid(other.fused(x * 2)), fullgraph=True)(x)
    grads = torch.autograd.grad(compiled.sum(), [x, *other.parameters()])
    eager = torch.sigmoid(unit.fused(x * 2))
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(grads, torch.autograd.grad(eager.sum(), [x, *unit.parameters()]), strict=True):
        torch.testing.assert_close(ours, theirs)


def relative(value, exact):
    return (value.double() - exact).norm() / exact.norm().clamp(min=1e-12)


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        ("autocast", "auto"),
        ("autocast", "library"),
        ("autocast", "reference"),
        ("float16", "reference"),
        ("float32", "auto"),
        ("float32", "library"),
    ],
)
def test_three_way_error_is_within_twice_stocks(single_unit_name, make_unit, run_both, mode, backend):
    """||ours - exact|| <= 2 ||stock - exact|| + eps/8 ||exact||, exact in float64 from the same rounded inputs."""
    dtype = torch.float16 if mode == "float16" else torch.float32
    # One ReLU mask that rounding flips is a larger difference than all arithmetic: flips must average out over seeds.
    errors = {}
    for seed in range(4):
        size = (8, 65, 64) if single_unit_name in ("stem", "conv1x1-bn-relu") else (8, 33, 32)
        if mode == "float32":
            size = (4, 9, 8)  # so few values that none comes close enough to zero for a flip
        # Stock's dilated bfloat16 wgrad is NaN on CPUs where channels are not a multiple of 16.
        scale = 8 if single_unit_name == "conv3x3-dilated" else 4
        unit, x = make_unit(single_unit_name, dtype=dtype, seed=seed, size=size, scale=scale)
        state = torch.get_rng_state()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            stock, ours = run_both(unit, x, backend=backend)
        torch.set_rng_state(state)
        exact, _ = run_both(copy.deepcopy(unit).double(), x.double())
        for name, values in named_results(stock, ours, exact).items():
            assert values[0].dtype == values[1].dtype, name
            pair = errors.setdefault(name, [])
            pair.append([relative(value, values[2]) for value in values[:2]])
    floor = torch.finfo(torch.bfloat16 if mode == "autocast" else dtype).eps / 8
    for name, pairs in errors.items():
        stocks, ours = torch.tensor(pairs).square().mean(0).sqrt()
        assert ours <= 2 * stocks + floor, name


def named_results(*results):
    """Output, gradients and running statistics of several runs, by name."""
    named = {"output": [out for out, _, _ in results]}
    for name in results[0][1]:
        named[name] = [grads[name] for _, grads, _ in results]
    for name in results[0][2]:
        if "running" in name:
            named[name] = [state[name] for _, _, state in results]
    return named


def test_dilated_bfloat16_wgrad_is_finite_in_channels_last():
    """oneDNN returns NaN for these shapes."""
    x, dy = torch.randn(8, 33, 32, 24).bfloat16(), torch.randn(8, 33, 32, 16).bfloat16()
    arguments = x, dy, (3, 3), (1, 1), (2, 2), (2, 2)
    exact = reference.conv2d_wgrad(*arguments)
    assert relative(library.conv2d_wgrad(*arguments), exact.double()) < torch.finfo(torch.bfloat16).eps


def test_autocast_leaves_the_small_matrices_in_float32(make_unit):
    """Under autocast a float32 matrix product in an operator body would run in bfloat16, in backward as well."""
    unit, x = make_unit("projection", dtype=torch.float32, size=(8, 16, 16))
    x = (x + 30).bfloat16().float()
    unit.convs[0].weight.data = unit.convs[0].weight.data.bfloat16().float()
    exact = copy.deepcopy(unit).double().stock(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = unit.fused(x, backend="reference")
        assert out.dtype == torch.bfloat16
    assert relative(out, exact) < 2 * torch.finfo(torch.bfloat16).eps


def test_float32_matches_stock_closely(unit_name, make_unit, run_both):
    unit, x = make_unit(unit_name, dtype=torch.float32)
    (stock_out, *_), (out, *_) = run_both(unit, x)
    torch.testing.assert_close(out, stock_out, rtol=1e-5, atol=1e-5)


def test_results_are_deterministic(unit_name, make_unit, run_both):
    unit, x = make_unit(unit_name, dtype=torch.float32)
    torch.manual_seed(0)
    _, (out, grads, _) = run_both(unit, x)
    torch.manual_seed(0)
    _, (again, grads_again, _) = run_both(unit, x)
    assert torch.equal(out, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck-projection-stride2", "basic", "stem"])
def test_nan_in_the_input_reaches_output_and_gradients_as_in_stock(name, make_unit, run_both):
    unit, x = make_unit(name)
    x[0, 0, 3, 3] = float("nan")
    unit.eval()
    (stock_out, stock_grads, _), (out, grads, _) = run_both(unit, x)
    assert torch.equal(out.isnan(), stock_out.isnan())
    for name in grads:
        assert grads[name].isnan().any() == stock_grads[name].isnan().any(), name


def test_three_identity_bottlenecks_save_at_most_056_of_stock():
    """Unique bytes that saved-tensor hooks see, parameters excluded; w = 64, 28x28, batch 8."""
    blocks = nn.Sequential(*(fastres.nn.Bottleneck(256, 64) for _ in range(3)))
    x = torch.randn(8, 256, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours = saved_bytes(blocks, x)
    assert ours <= 0.56 * saved_bytes(fastres.revert(blocks), x)


def test_checkpointing_retain_graph_and_accumulation(make_unit):
    unit, x = make_unit("bottleneck")
    other = copy.deepcopy(unit)
    checkpoint(unit.fused, x.requires_grad_(), use_reentrant=False).sum().backward()
    y = x.detach().clone().requires_grad_()
    out = other.fused(y)
    out.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.grad, y.grad)
    out.sum().backward()
    torch.testing.assert_close(y.grad, 2 * x.grad)


def test_bfloat16_parameters_with_float32_running_statistics(make_unit):
    unit, x = make_unit("bottleneck", dtype=torch.float32)
    for bn in unit.bns:
        bn.weight.data, bn.bias.data = bn.weight.data.bfloat16(), bn.bias.data.bfloat16()
    for conv in unit.convs:
        conv.to(torch.bfloat16)
    before = unit.bns[0].running_mean.clone()
    out = unit.fused(x.bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and unit.bns[0].weight.grad.dtype == torch.bfloat16
    assert unit.bns[0].running_mean.dtype == torch.float32 and not torch.equal(unit.bns[0].running_mean, before)
