"""Whatever fusion cannot honour makes a block run its children, with stock's numbers and side effects."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

import fastres
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU2d, Stem, projection_shortcut

SEEN = []


def hook(*args):
    SEEN.append(type(args[0]).__name__)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class OtherConv(nn.Conv2d):
    pass


class Subclass(torch.Tensor):
    pass


def bottleneck() -> Bottleneck:
    torch.manual_seed(0)
    return Bottleneck(8, 2, downsample=projection_shortcut(8, 8)).double()


def swap_class(child: nn.Module, cls: type) -> None:
    child.__class__ = cls


def own_forward(child: nn.Module) -> None:
    child.forward = type(child).forward.__get__(child)


def with_bias(conv: nn.Conv2d) -> None:
    conv.bias = nn.Parameter(torch.full((conv.out_channels,), 0.5, dtype=torch.float64))


def subclass_weight(child: nn.Module) -> None:
    child.weight = nn.Parameter(child.weight.detach().as_subclass(Subclass))


def without_counter(bn: nn.BatchNorm2d) -> None:
    bn.momentum = bn.num_batches_tracked = None


def set_attributes(child: nn.Module, **values) -> None:
    for name, value in values.items():
        setattr(child, name, value)


CHANGES = {
    "forward hook on a conv": (lambda b: b.conv1.register_forward_hook(hook), "conv1 has a hook"),
    "forward pre-hook on a norm": (lambda b: b.bn2.register_forward_pre_hook(hook), "bn2 has a hook"),
    "backward hook on a conv": (lambda b: b.conv3.register_full_backward_hook(hook), "conv3 has a hook"),
    "backward pre-hook on the ReLU": (
        lambda b: (setattr(b.relu, "inplace", False), b.relu.register_full_backward_pre_hook(hook)),
        "relu has a hook",
    ),
    "weight norm": (lambda b: parametrizations.weight_norm(b.conv2), "conv2 is ParametrizedConv2d, not nn.Conv2d"),
    "a parametrized gamma": (
        lambda b: parametrize.register_parametrization(b.bn1, "weight", Doubled()),
        "bn1 is ParametrizedBatchNorm2d",
    ),
    "pruning": (lambda b: prune.l1_unstructured(b.conv2, "weight", 0.5), "conv2 has a hook"),
    "another conv class": (lambda b: swap_class(b.conv1, OtherConv), "conv1 is OtherConv, not nn.Conv2d"),
    "a group norm": (lambda b: setattr(b, "bn3", nn.GroupNorm(2, 8).double()), "bn3 is GroupNorm, not nn.BatchNorm2d"),
    "another activation": (lambda b: setattr(b, "relu", nn.GELU()), "relu is GELU, not nn.ReLU"),
    "a forward on the instance": (lambda b: own_forward(b.bn2), "bn2 has a forward of its own"),
    "a conv bias": (lambda b: with_bias(b.conv1), "conv1 has a bias"),
    "a tensor subclass as weight": (lambda b: subclass_weight(b.conv2), "conv2.weight is Subclass, not a plain tensor"),
    "a tensor subclass as gamma": (lambda b: subclass_weight(b.bn2), "bn2.weight is Subclass, not a plain tensor"),
    "reflection padding": (
        lambda b: (
            set_attributes(b.conv2, padding_mode="reflect"),
            set_attributes(b.conv2, _reversed_padding_repeated_twice=[1, 1, 1, 1]),
        ),
        "conv2 pads with 'reflect'",
    ),
    "padding by name": (lambda b: set_attributes(b.conv2, padding="same"), "conv2 has padding='same', not a pair"),
    "padding that is not the dilation": (
        lambda b: (set_attributes(b.conv1, padding=(1, 1)), set_attributes(b.conv2, padding=(0, 0))),
        "conv1 has padding=(1, 1), not 0",
    ),
    "no counter for a cumulative average": (lambda b: without_counter(b.bn1), "bn1 has momentum=None and no num_ba"),
    "a grouped 1x1 conv": (
        lambda b: set_attributes(b, conv3=nn.Conv2d(2, 8, 1, groups=2, bias=False).double()),
        "conv3 has groups=2, not 1",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_child_runs(change, fused_calls, stock_twin, run, assert_equal_in_float64):
    apply, reason = CHANGES[change]
    block = bottleneck()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    stock = stock_twin(block)
    block(x)
    assert fused_calls == {"bottleneck": 1}
    block.load_state_dict(stock.state_dict())
    for module in (block, stock):
        torch.manual_seed(1)
        apply(module)
    assert block.fused_reason().startswith(reason)
    SEEN.clear()
    expected = run(stock, x)
    fired = list(SEEN)
    SEEN.clear()
    assert_equal_in_float64(run(block, x), expected)
    assert fired == SEEN
    assert bool(fired) == ("hook on" in change)
    assert fused_calls == {"bottleneck": 1}


def test_a_removed_hook_lets_the_block_fuse_again(fused_calls):
    block, x = bottleneck(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    handle = block.conv2.register_forward_hook(hook)
    block(x)
    assert not fused_calls
    handle.remove()
    block(x)
    assert fused_calls == {"bottleneck": 1}


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_other_norms(norm, fused_calls, stock_twin, run, assert_equal_in_float64):
    block = Bottleneck(8, 2, norm_layer=norm).double().eval()  # SyncBatchNorm does not train on a CPU
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    assert block.fused_reason() == f"bn1 is {norm.__name__}, not nn.BatchNorm2d"
    assert_equal_in_float64(run(block, x), run(stock_twin(block), x))
    assert not fused_calls


def test_converted_sync_batch_norm(fused_calls):
    block = nn.SyncBatchNorm.convert_sync_batchnorm(bottleneck()).eval()
    assert type(block) is Bottleneck
    block(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    assert not fused_calls


@pytest.mark.parametrize(
    ("module", "child", "change", "reason"),
    [
        (BasicBlock(4, 4), "conv2", {"stride": (2, 2)}, "conv2 has stride=(2, 2), not 1"),
        (BasicBlock(4, 4), "conv1", {"stride": (2, 1)}, "conv1 has stride=(2, 1)"),
        (BasicBlock(4, 4), "conv1", {"dilation": (2, 2), "padding": (2, 2)}, "conv1 has dilation=(2, 2), not 1"),
        (BasicBlock(4, 4), "conv1", {"stride": 2}, "conv1 has stride=2, not a pair"),
        (Bottleneck(8, 2, 2, stride_on_1x1=True), "conv2", {"stride": (2, 2)}, "conv2 has stride=(2, 2), not 1"),
        (ConvBNReLU2d(4, 4), "conv", {"padding_mode": "circular"}, "conv pads with 'circular'"),
        (ConvBNReLU2d(4, 4), "conv", {"padding": "same"}, "conv has padding='same', not a pair"),
        (ConvBNReLU2d(4, 4), "conv", {"dilation": (1,)}, "conv has dilation=(1,), not a pair"),
        (
            ConvBNReLU2d(4, 4),
            "conv",
            {"bias": nn.Parameter(torch.ones(4).as_subclass(Subclass))},
            "conv.bias is Subclass, not a plain tensor",
        ),
        (Stem(), "conv1", {"dilation": (2, 2)}, "conv1 has groups or dilation"),
        (Stem(), "maxpool", {"kernel_size": 2}, "maxpool is not 3x3 with stride 2 and padding 1"),
        (Stem(), "maxpool", {"ceil_mode": True}, "maxpool is not 3x3 with stride 2 and padding 1"),
        (Stem(), "relu", {"forward": torch.relu}, "relu has a forward of its own"),
        (BasicBlock(4, 4), "bn1", {"running_var": None}, "bn1 has only one of running_mean and running_var"),
    ],
    # By names: the text of a function has its address, which differs between processes.
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(type(value), "unit", str(value)),
)
def test_other_geometries(module, child, change, reason):
    module = copy.deepcopy(module)
    assert module.fused_reason() is None
    set_attributes(module.get_submodule(child), **change)
    assert module.fused_reason() == reason


SHORTCUTS = {
    "hook": (lambda d: d[0].register_forward_hook(hook), "downsample[0] has a hook"),
    "hook on the whole": (lambda d: d.register_forward_hook(hook), "downsample has a hook"),
    "bias": (lambda d: with_bias(d[0]), "downsample[0] has a bias"),
    "pooling": (lambda d: d.insert(0, nn.AvgPool2d(1)), "downsample has 3 children, not a conv and a norm"),
    "no norm": (lambda d: d.pop(1), "downsample has 1 children, not a conv and a norm"),
    "3x3": (
        lambda d: d.__setitem__(0, nn.Conv2d(8, 8, 3, padding=1, bias=False).double()),
        "downsample[0] has kernel_size=(3, 3), not 1",
    ),
}


@pytest.mark.parametrize("change", SHORTCUTS)
def test_a_shortcut_that_cannot_be_fused_runs_beside_the_fused_rest(
    change, fused_calls, stock_twin, run, assert_equal_in_float64
):
    apply, reason = SHORTCUTS[change]
    block = bottleneck().eval()  # in training the gradient of a bias before a norm is zero but for rounding
    stock = stock_twin(block)
    for module in (block, stock):
        torch.manual_seed(1)
        apply(module.downsample)
    assert block.separate_reason() == reason
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    SEEN.clear()
    assert_equal_in_float64(run(block, x), run(stock, x))
    assert len(SEEN) == (2 if "hook" in change else 0)
    assert fused_calls == {"bottleneck": 1}


def test_hooks_on_the_block_itself_fire_around_the_fused_call(fused_calls):
    block, x = bottleneck(), torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    block.register_forward_hook(lambda module, args, output: seen.append("forward") or 2 * output)
    block.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    y = block(x)
    y.sum().backward()
    assert seen == ["pre", "forward", "backward"]
    assert torch.equal(y, 2 * block.forward(x))
    assert fused_calls == {"bottleneck": 2}


def test_hooks_on_parameters_fire(fused_calls):
    block, seen = bottleneck(), []
    block.conv2.weight.register_hook(lambda grad: seen.append("gradient"))
    block.conv2.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    block(torch.randn(2, 8, 4, 4, dtype=torch.float64)).sum().backward()
    assert seen == ["gradient", "accumulated"]
    assert fused_calls == {"bottleneck": 1}


def test_a_global_hook_sees_the_children(fused_calls):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        bottleneck()(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    finally:
        handle.remove()
    assert not fused_calls
    assert seen.count(nn.Conv2d) == 4


INPUTS = {
    "subclass": lambda: torch.randn(2, 8, 4, 4, dtype=torch.float64).as_subclass(Subclass),
    "empty": lambda: torch.randn(0, 8, 4, 4, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_unusual_inputs(kind, fused_calls, stock_twin):
    block, x = bottleneck().eval(), INPUTS[kind]()
    stock = stock_twin(block)
    y, expected = block(x), stock(x)
    assert type(y) is type(expected)
    assert y.shape == expected.shape
    assert y.device == expected.device
    if kind == "subclass":
        assert torch.equal(y, expected)
    assert not fused_calls


def test_meta_tensors_give_shapes_and_strides_in_both_directions(fused_calls, stock_twin):
    block = bottleneck().to("meta")
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, device="meta", requires_grad=True)
    expected = stock_twin(block)(x)
    y = block(x)
    assert fused_calls == {"bottleneck": 1}
    assert y.shape == expected.shape and y.device.type == "meta"
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(weight.grad.shape == weight.shape for weight in block.parameters())


def test_a_parameter_as_input_is_fused(fused_calls):
    image = nn.Parameter(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    bottleneck()(image).sum().backward()
    assert image.grad is not None
    assert fused_calls == {"bottleneck": 1}


def test_func_grad_and_vmap(fused_calls, stock_twin):
    block = bottleneck().eval()
    stock = stock_twin(block)
    x = torch.randn(3, 2, 8, 4, 4, dtype=torch.float64)
    gradients = [torch.func.grad(lambda t, m=module: m(t).square().sum())(x[0]) for module in (block, stock)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.vmap(block)(x), torch.vmap(stock)(x), rtol=1e-10, atol=1e-12)
    assert not fused_calls


def test_functional_call_is_fused(fused_calls, stock_twin):
    block, x = bottleneck().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    state = {name: 0.5 * tensor for name, tensor in block.state_dict().items() if tensor.is_floating_point()}
    y = torch.func.functional_call(block, state, (x,))
    expected = torch.func.functional_call(stock_twin(block), state, (x,))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert fused_calls == {"bottleneck": 1}


def test_forward_mode_differentiation(fused_calls, stock_twin):
    block, x = bottleneck().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    tangents = []
    for module in (block, stock_twin(block)):
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)
    assert not fused_calls


def test_jit_trace_records_the_children(fused_calls):
    block, x = bottleneck().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    traced = torch.jit.trace(block, x, check_trace=False)  # the check would call the block again
    assert not fused_calls
    assert "fastres::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), block(x), rtol=1e-10, atol=1e-12)


def test_fx_symbolic_trace_records_the_children(fused_calls):
    block, x = bottleneck().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    graph = torch.fx.symbolic_trace(nn.Sequential(block))
    targets = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert {"0.conv1", "0.bn1", "0.relu", "0.conv3", "0.downsample.0"} <= targets
    assert not fused_calls
    torch.testing.assert_close(graph(x), block(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_export_records_plain_operators(strict):
    block, x = bottleneck().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(block, (x,), dynamic_shapes=({**batch},), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("conv2d" in target for target in targets)
    assert not any("fastres" in target for target in targets)
    larger = torch.randn(5, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(program.module()(larger), block(larger), rtol=1e-10, atol=1e-12)


def test_jit_script_compiles_the_stock_classes_and_leaves_the_model_fused(fused_calls):
    torch.manual_seed(0)
    model = fastres.models.resnet18(num_classes=3).double().eval()
    classes = [type(module) for module in model.modules()]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    scripted = torch.jit.script(model)
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-10, atol=1e-12)
    assert fused_calls == {"stem": 1, "stage": 4}
    assert scripted.layer1[0].conv1.weight.data_ptr() == model.layer1[0].conv1.weight.data_ptr()
