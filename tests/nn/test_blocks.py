"""Every module of fastres.nn against its stock form, in float64 to 1e-10, and what its constructor refuses."""

from __future__ import annotations

import collections
import functools

import pytest
import torch
from torch import nn

from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU2d, Projection, Stem, make_shortcut


def basic(stride=1, shortcut="B", channels=(6, 6), **bn):
    norm = functools.partial(nn.BatchNorm2d, **bn)
    downsample = make_shortcut(shortcut, *channels, stride, norm)
    return BasicBlock(*channels, stride, downsample, norm_layer=norm)


def bottleneck(stride=1, shortcut="B", channels=(12, 3), stride_on_1x1=False, groups=1, dilation=1, bn=None):
    norm = functools.partial(nn.BatchNorm2d, **(bn or {}))
    downsample = make_shortcut(shortcut, channels[0], 4 * channels[1], stride, norm)
    width = 64 * (2 if groups > 1 else 1)
    return Bottleneck(
        *channels, stride, downsample, groups, width, dilation, norm_layer=norm, stride_on_1x1=stride_on_1x1
    )


MODULES = {
    "basic identity": (basic, 6, "basic_block"),
    "basic A": (functools.partial(basic, 2, "A", (6, 10)), 6, "basic_block"),
    "basic B": (functools.partial(basic, 2, "B", (6, 10)), 6, "basic_block"),
    "basic C": (functools.partial(basic, 1, "C"), 6, "basic_block"),
    "bottleneck identity": (bottleneck, 12, "bottleneck"),
    "bottleneck A": (functools.partial(bottleneck, 2, "A", (6, 3)), 6, "bottleneck"),
    "bottleneck B": (functools.partial(bottleneck, 2, "B", (6, 3)), 6, "bottleneck"),
    "bottleneck B stride 1": (functools.partial(bottleneck, 1, "B", (6, 3)), 6, "bottleneck"),
    "bottleneck C": (functools.partial(bottleneck, 1, "C"), 12, "bottleneck"),
    "bottleneck stride on 1x1": (functools.partial(bottleneck, 2, "B", (6, 3), True), 6, "bottleneck"),
    "bottleneck grouped": (functools.partial(bottleneck, 2, "B", (6, 3), groups=2), 6, "bottleneck"),
    "bottleneck dilated": (functools.partial(bottleneck, 1, "B", (6, 3), dilation=2), 6, "bottleneck"),
    "conv_bn_relu 3x3": (functools.partial(ConvBNReLU2d, 3, 7), 3, "conv_bn_relu"),
    "conv_bn_relu 5x5 grouped": (functools.partial(ConvBNReLU2d, 4, 6, 5, 2, 2, 2), 4, "conv_bn_relu"),
    "conv_bn_relu 1x1": (functools.partial(ConvBNReLU2d, 3, 5, 1, 2), 3, "conv_bn_relu"),
    "projection": (functools.partial(Projection, 4, 7, 2), 4, "projection"),
    "projection stride 1": (functools.partial(Projection, 4, 7), 4, "projection"),
    "stem": (functools.partial(Stem, 3, 5), 3, "stem"),
    "stem grey": (functools.partial(Stem, 1, 5), 1, "stem"),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor, str]:
    """The module in float64 with batch norms away from their initial values, an input of odd size, its unit."""
    factory, channels, unit = MODULES[name]
    torch.manual_seed(len(name))
    module = factory().double()
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            if bn.affine:
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                nn.init.normal_(bn.bias)
            if bn.track_running_stats:
                nn.init.normal_(bn.running_mean)
                nn.init.uniform_(bn.running_var, 0.5, 2)
    return module, torch.randn(3, channels, 9, 7, dtype=torch.float64, requires_grad=True), unit


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["train", "eval", "one norm frozen"])
def test_equals_stock(name, mode, fused_calls, stock_twin, run, assert_equal_in_float64):
    module, x, unit = make(name)
    module.train(mode != "eval")
    if mode == "one norm frozen":
        next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    stock = stock_twin(module)
    assert type(stock) is type(module).stock_class
    assert_equal_in_float64(run(module, x), run(stock, x))
    assert fused_calls == {unit: 1}


@pytest.mark.parametrize(
    "bn",
    [{"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_options(bn, training, fused_calls, stock_twin, run, assert_equal_in_float64):
    torch.manual_seed(0)
    module = bottleneck(2, "B", (6, 3), bn=bn).double()
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    stock = stock_twin(module)
    for step in range(3):  # the cumulative average of momentum=None shows from the second step on
        module.train(training or step < 1)
        stock.train(training or step < 1)
        module.zero_grad()
        stock.zero_grad()
        assert_equal_in_float64(run(module, x + step), run(stock, x + step))
    assert fused_calls == {"bottleneck": 3}


def test_flags_of_a_norm_are_read_at_every_call(fused_calls, stock_twin, run, assert_equal_in_float64):
    module, x, _ = make("bottleneck B")
    stock = stock_twin(module)

    def eval_with_batch_statistics(block):
        block.eval()
        block.bn2.track_running_stats = False
        block.bn2.running_mean = block.bn2.running_var = None

    def train_without_tracking(block):
        block.train()
        block.bn1.track_running_stats = False

    def other_numbers(block):
        block.bn3.momentum, block.bn3.eps = 0.7, 0.2

    for change in (train_without_tracking, other_numbers, eval_with_batch_statistics):
        change(module)
        change(stock)
        module.zero_grad()
        stock.zero_grad()
        assert_equal_in_float64(run(module, x), run(stock, x))
    assert fused_calls == {"bottleneck": 3}


@pytest.mark.parametrize("name", ["bottleneck B", "basic A", "stem"])
def test_subsets_of_parameters_that_need_gradients(name, fused_calls, stock_twin, run, assert_equal_in_float64):
    module, x, unit = make(name)
    names = [name for name, _ in module.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        wanted = {n for n in names if torch.rand((), generator=generator) < 0.5}
        for n, parameter in module.named_parameters():
            parameter.requires_grad_(n in wanted)
        x.requires_grad_(bool(torch.rand((), generator=generator) < 0.5))
        stock = stock_twin(module)
        module.zero_grad()
        ours = run(module, x)
        assert_equal_in_float64(ours, run(stock, x))
        assert all((ours[f"grad {n}"] is not None) == (n in wanted) for n in names)
    assert fused_calls == {unit: 6}


LARGE_MODULES = {
    "basic_block A": lambda: BasicBlock(16, 32, 2, make_shortcut("A", 16, 32, 2)),
    "bottleneck identity": lambda: Bottleneck(16, 4),
    "bottleneck A": lambda: Bottleneck(16, 8, 2, make_shortcut("A", 16, 32, 2)),
    "bottleneck B": lambda: Bottleneck(16, 8, 2, make_shortcut("B", 16, 32, 2)),
    "stem": lambda: Stem(16, 16),
}


@pytest.mark.parametrize("name", LARGE_MODULES)
def test_bfloat16_autocast_is_as_close_to_float64_as_stock_is(name, fused_calls, stock_twin, run):
    # Large and several times: the ReLU masks that rounding happens to flip decide the errors of a single small case.
    squares = collections.defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for seed in range(4):
        torch.manual_seed(seed)
        module = LARGE_MODULES[name]()
        x = torch.randn(8, 16, 17, 15, requires_grad=True)
        exact = run(stock_twin(module).double(), x.double())
        stock = stock_twin(module)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = run(module, x), run(stock, x)
        assert ours["output"].dtype == theirs["output"].dtype == torch.bfloat16
        assert module.conv1.weight.grad.dtype == torch.float32
        for key, value in exact.items():
            parts = ours[key].double() - value, theirs[key].double() - value, value.double()
            squares[key] += torch.stack([part.square().sum() for part in parts])
    assert fused_calls == {name.split()[0]: 4}
    for key, sums in squares.items():
        error, stock_error, norm = sums.sqrt()
        assert error <= 2 * stock_error + torch.finfo(torch.bfloat16).eps / 8 * norm, key


@pytest.mark.parametrize("name", MODULES)
def test_output_and_input_gradient_are_channels_last(name):
    module, x, _ = make(name)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODULES)
def test_output_is_not_a_view(name):
    """Autograd refuses in-place changes to a view that a function made, and fully_shard warns of it."""
    module, x, _ = make(name)
    assert not module(x)._is_view()


def test_gradients_keep_the_strides_of_channels_last_parameters():
    module, x, _ = make("bottleneck B")
    module.to(memory_format=torch.channels_last)
    module(x).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_has_the_stock_keys_in_the_stock_order(name, stock_twin):
    module, _, _ = make(name)
    assert list(module.state_dict()) == list(stock_twin(module).state_dict())


def test_wrong_input_is_named():
    block = Bottleneck(8, 2)
    with pytest.raises(ValueError, match=r"bottleneck: x must have 8 channels \(dimension 1\).*has 6"):
        block(torch.randn(2, 6, 4, 4))
    with pytest.raises(ValueError, match=r"bottleneck: x must be \[N, C, H, W\], has 3 dimensions"):
        block(torch.randn(8, 4, 4))
    with pytest.raises(TypeError, match="x is torch.float64 but the weights are torch.float32"):
        block(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 8, 1, 1))
    with pytest.raises(ValueError, match="an identity shortcut needs"):
        Bottleneck(8, 2, stride=2)(torch.randn(2, 8, 4, 4))


def test_an_unknown_backend_is_refused_at_the_call():
    block = Bottleneck(8, 2)
    block.backend = "cuda"
    with pytest.raises(ValueError, match="backend='cuda' is not known"):
        block(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("option", [{"groups": 2}, {"base_width": 32}, {"dilation": 2}], ids=str)
def test_basic_block_refuses_what_it_does_not_have(option):
    with pytest.raises(ValueError, match="use Bottleneck"):
        BasicBlock(8, 8, **option)
