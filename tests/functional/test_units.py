"""Every fused unit against the stock composition in float64: values, gradients, running statistics, modes."""

import random

import pytest
import torch

from fastres import plan

RTOL = 1e-10


def assert_close(name, ours, stock):
    assert (ours is None) == (stock is None), name
    if stock is None:
        return
    assert ours.shape == stock.shape and ours.dtype == stock.dtype, name
    # A conv's bias in front of batch statistics has no gradient but what rounding leaves of a sum of larger terms.
    scale = stock.double().norm().clamp(min=1 if name == "convs.0.bias" else 1e-3)
    assert (ours.double() - stock.double()).norm() <= RTOL * scale, name


def assert_same(results):
    (stock_out, stock_grads, stock_state), (out, grads, state) = results
    assert_close("output", out, stock_out)
    assert grads.keys() == stock_grads.keys()
    for name in stock_grads:
        assert_close(name, grads[name], stock_grads[name])
    for name in stock_state:
        assert_close(name, state[name], stock_state[name])


def test_training_matches_stock(unit_name, make_unit, run_both):
    assert_same(run_both(*make_unit(unit_name)))


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"momentum": 0.7, "eps": 1e-2}, {"affine": False}, {"track_running_stats": False}]
)
def test_batch_norm_options_match_stock(unit_name, make_unit, run_both, options):
    assert_same(run_both(*make_unit(unit_name, **options)))


def test_eval_matches_stock(unit_name, make_unit, run_both):
    unit, x = make_unit(unit_name)
    assert_same(run_both(unit.eval(), x))


def test_eval_matches_stock_through_the_library_kernels(unit_name, make_unit, run_both):
    """float64 always runs the reference, so constant statistics need a look at the library in float32 as well."""
    unit, x = make_unit(unit_name, dtype=torch.float32)
    (stock_out, stock_grads, _), (out, grads, _) = run_both(unit.eval(), x, backend="library")
    torch.testing.assert_close(out, stock_out, rtol=1e-5, atol=1e-5)
    for name in grads:
        torch.testing.assert_close(grads[name], stock_grads[name], rtol=1e-4, atol=1e-4)


def test_eval_without_running_stats_matches_stock(unit_name, make_unit, run_both):
    unit, x = make_unit(unit_name, track_running_stats=False)
    assert_same(run_both(unit.eval(), x))


def test_each_batch_norm_frozen_alone_matches_stock(unit_name, make_unit, run_both):
    unit, x = make_unit(unit_name)
    for bn in unit.bns:
        bn.eval()
        assert_same(run_both(unit, x))
        bn.train()


def leaves_of(unit):
    return ["x", *(name for name, _ in unit.named_parameters())]


def run_with_grad_of(unit, x, run_both, wanted):
    for name, parameter in unit.named_parameters():
        parameter.requires_grad_(name in wanted)
    assert_same(run_both(unit, x, x_grad="x" in wanted))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_requires_grad_subsets_match_stock(unit_name, make_unit, run_both, train):
    unit, x = make_unit(unit_name)
    unit.train(train)
    leaves = leaves_of(unit)
    subsets = [[leaf] for leaf in leaves] + [[other for other in leaves if other != leaf] for leaf in leaves]
    pick = random.Random(0)
    subsets += [[leaf for leaf in leaves if pick.random() < 0.5] for _ in range(20)]
    for wanted in subsets:
        run_with_grad_of(unit, x, run_both, wanted)


@pytest.mark.parametrize("name", ["bottleneck", "basic"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_ready_made_shortcut_matches_stock(name, make_unit, run_both, train):
    unit, x = make_unit(name)
    assert_same(run_both(unit.train(train), x, shortcut=torch.randn_like(x)))
    for parameter in unit.parameters():
        parameter.requires_grad_(False)
    assert_same(run_both(unit, x, shortcut=torch.randn_like(x), x_grad=False))


def test_three_training_steps_accumulate_running_statistics_as_stock(unit_name, make_unit):
    for momentum in (0.1, None):
        states = []
        for method in ("stock", "fused"):
            unit, x = make_unit(unit_name, momentum=momentum)
            for step in range(3):
                getattr(unit, method)(x * (step + 1) + step)
            states.append(unit.state_dict())
        for name in states[0]:
            assert_close(name, states[1][name], states[0][name])


def test_gradcheck(unit_name, make_unit):
    size = (2, 6, 5) if unit_name == "stem" else (2, 3, 4)
    unit, x = make_unit(unit_name, size=size)
    names = [f"unit.{name}" for name, _ in unit.named_parameters()]

    def function(x, *values):
        # The running statistics, which every call updates, do not enter the output.
        return torch.func.functional_call(_Fused(unit), dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in unit.parameters()]
    # Of a stage's many weights, in random directions.
    fast = unit_name.startswith("stage")
    inputs = x.requires_grad_(), *values
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=fast)


class _Fused(torch.nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x):
        return self.unit.fused(x)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize("batch", [2, 3])
def test_tiny_images_match_stock(unit_name, make_unit, run_both, size, batch):
    unit, x = make_unit(unit_name)
    assert_same(run_both(unit, torch.randn(batch, x.shape[1], *size, dtype=x.dtype)))


def test_nchw_input_and_odd_gradients_match_stock(unit_name, make_unit):
    """Backward is handed stride-0 and non-contiguous gradients; it must neither misread nor write them."""
    for reduce in (lambda out: out.sum(), lambda out: (out.flip(-1).transpose(2, 3) ** 2).sum()):
        results = []
        for method in ("stock", "fused"):
            unit, x = make_unit(unit_name)
            x = x.contiguous(memory_format=torch.channels_last if method == "stock" else torch.contiguous_format)
            x.requires_grad_()
            out = getattr(unit, method)(x)
            g = torch.ones((), dtype=x.dtype).expand(out.shape)
            leaves = [x, *unit.parameters()]
            first = torch.autograd.grad(reduce(out), leaves, retain_graph=True)
            results.append((first, torch.autograd.grad(out, leaves, g)))
            assert g.eq(1).all()
        for stock, ours in zip(*results, strict=True):
            for name, a, b in zip(leaves_of(unit), stock, ours, strict=True):
                assert_close(name, b, a)


def test_outputs_and_gradients_are_channels_last_and_follow_the_parameters(unit_name, make_unit):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        unit, x = make_unit(unit_name)
        unit = unit.to(memory_format=memory_format)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        out = unit.fused(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        out.square().sum().backward()
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        for conv in unit.convs:
            assert conv.weight.grad.stride() == conv.weight.stride()


def test_one_value_per_channel_raises_as_pytorch(make_unit):
    for name in ("bottleneck", "basic", "conv3x3-bn-relu", "projection"):
        unit, x = make_unit(name)
        x = x[:1, :, :1, :1]
        for method in ("stock", "fused"):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                getattr(unit, method)(x)
        unit.eval()
        assert_close(name, unit.fused(x), unit.stock(x))


def test_double_backward_raises_and_says_what_to_do(unit_name, make_unit):
    unit, x = make_unit(unit_name)
    front = torch.nn.Conv2d(x.shape[1], x.shape[1], 1).double()
    for parameter in unit.parameters():
        parameter.requires_grad_(False)
    (gradient,) = torch.autograd.grad(unit.fused(front(x)).square().sum(), front.bias, create_graph=True)
    with pytest.raises(RuntimeError, match="fastres.revert"):
        torch.autograd.grad(gradient.square().sum(), front.weight)


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "stored"])
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck-projection-stride2", "basic-projection", "projection"])
def test_backward_has_the_form_of_its_forward(name, folded, make_unit):
    """Whatever the plan says by then."""
    unit, x = make_unit(name)
    leaves = [x.requires_grad_(), *unit.parameters()]
    with plan.wrapping(lambda k: plan.in_form(k, gram_folding=folded)):
        out = unit.fused(x)
    g = torch.randn_like(out)
    with plan.wrapping(lambda k: plan.in_form(k, gram_folding=not folded)):
        ours = torch.autograd.grad(out, leaves, g)
    for index, stock in enumerate(torch.autograd.grad(unit.stock(x), leaves, g)):
        assert_close(str(index), ours[index], stock)


def test_input_modified_in_place_before_backward_raises(make_unit):
    unit, x = make_unit("bottleneck")
    x.requires_grad_()
    z = x * 1
    out = unit.fused(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = unit.fused(x * 1)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["bottleneck-projection-stride2", "basic", "conv3x3-bn-relu", "stem", "projection"])
class TestBadInput:
    def test_rank(self, name, make_unit):
        unit, x = make_unit(name)
        with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], has 3 dimensions"):
            unit.fused(x[0])

    def test_channels(self, name, make_unit):
        unit, x = make_unit(name)
        with pytest.raises(ValueError, match=f"x must have {x.shape[1]} channels .* has {x.shape[1] + 1}"):
            unit.fused(torch.cat([x, x[:, :1]], 1))

    def test_empty(self, name, make_unit):
        unit, x = make_unit(name)
        with pytest.raises(ValueError, match=r"x is empty, \(0, "):
            unit.fused(x[:0])

    def test_dtype(self, name, make_unit):
        unit, x = make_unit(name)
        with pytest.raises(TypeError, match="x is torch.float32 but the weights are torch.float64"):
            unit.fused(x.float())
        with pytest.raises(TypeError, match="x must be float64"):
            unit.fused(x.long())

    def test_device(self, name, make_unit):
        unit, x = make_unit(name)
        with pytest.raises(ValueError, match="x is on meta but the weights are on cpu"):
            unit.fused(x.to("meta"))

    def test_backend(self, name, make_unit):
        unit, x = make_unit(name)
        with pytest.raises(ValueError, match="backend='cudnn' is not known"):
            unit.fused(x, backend="cudnn")


def test_shortcut_errors_name_the_argument(make_unit):
    unit, x = make_unit("bottleneck")
    with pytest.raises(ValueError, match="shortcut must have the output's shape"):
        unit.fused(x, x[:, :3])
    unit, x = make_unit("bottleneck-projection")
    with pytest.raises(ValueError, match="either projection or shortcut"):
        unit.fused(x, x)
    unit, x = make_unit("basic")
    unit.stride = 2
    with pytest.raises(ValueError, match="an identity shortcut needs an output of x's shape"):
        unit.fused(x)
