"""nn.Sequential with conv + BN + ReLU in it: stock's numbers and side effects, fused where that is possible."""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastres
from fastres.nn import Bottleneck
from fastres.nn.sequential import FusedSequential, triples


def vgg() -> nn.Sequential:
    """Three triples, at 0, 4 and 8, two of them with a bias, beside every kind of neighbour."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2),
        *(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Dropout2d(0.0, inplace=True),
        *(nn.Conv2d(6, 8, (5, 3), 2, padding=(2, 1), groups=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
            nn.init.normal_(bn.running_mean)
    return model


def images(**options) -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64, **options)


@pytest.fixture
def assert_same(run, assert_equal_in_float64):
    """A function that compares a step of two models; `zeros` names the gradients that are zero but for rounding."""

    def check(model, stock, x, zeros=()):
        ours, expected = run(model, x), run(stock, x)
        for name in zeros:
            assert ours.pop(f"grad {name}").eq(0).all()
            assert expected.pop(f"grad {name}").abs().max() < 1e-10
        assert_equal_in_float64(ours, expected)

    return check


def hook(*args):
    pass


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("mode", ["train", "eval", "one norm frozen"])
def test_equals_stock_and_runs_every_triple_fused(mode, fused_calls, assert_same):
    stock = vgg().train(mode != "eval")
    if mode == "one norm frozen":
        stock[1].eval()
    model = fastres.convert(copy.deepcopy(stock), strict=True)
    zeros = {"train": ["0.bias", "8.bias", "11.bias"], "one norm frozen": ["8.bias", "11.bias"]}.get(mode, [])
    # The last conv has no ReLU behind it, stays as it is, and so keeps stock's rounding.
    x, g = images(requires_grad=True), [name for name in zeros if name != "11.bias"]
    for conv_bias in set(zeros) - set(g):
        for network in (model, stock):
            network.get_parameter(conv_bias).requires_grad_(False)
    for _ in range(3):
        model.zero_grad()
        stock.zero_grad()
        assert_same(model, stock, x, g)
    assert fused_calls == {"conv_bn_relu": 9}


CHANGES = {
    "a hook on a conv": (lambda m: m[4].register_forward_hook(hook), "4 has a hook"),
    "a hook on a norm": (lambda m: m[5].register_forward_pre_hook(hook), "5 has a hook"),
    "a hook on a ReLU": (lambda m: m[6].register_full_backward_hook(hook), "6 has a hook"),
    "a parametrization": (lambda m: parametrizations.weight_norm(m[4]), "4 is ParametrizedConv2d, not nn.Conv2d"),
    "padding by name": (lambda m: setattr(m[4], "padding", "same"), "4 has padding='same', not a pair"),
    "a forward on the instance": (lambda m: setattr(m[6], "forward", torch.relu), "6 has a forward of its own"),
    "another norm of the kind": (
        lambda m: m.__setitem__(5, nn.SyncBatchNorm(6).double().eval()),
        "5 is SyncBatchNorm, not nn.BatchNorm2d",
    ),
    "a norm of another kind": (lambda m: m.__setitem__(5, nn.GroupNorm(2, 6).double()), None),
    "another activation": (lambda m: m.__setitem__(6, nn.ReLU6()), None),
    "something in between": (lambda m: m.insert(6, nn.Identity()), None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_triple_that_cannot_be_fused_runs_as_modules_beside_the_others(change, fused_calls, assert_same):
    apply, reason = CHANGES[change]
    stock = vgg().eval()  # where no gradient is zero
    model = fastres.convert(copy.deepcopy(stock))
    for network in (model, stock):
        torch.manual_seed(1)
        apply(network)
    assert model.fused_reason() is None
    assert model.separate_reason() == (reason and f"4-6 run as modules: {reason}")
    assert model.form(torch.float64, torch.device("cpu")) == f"2{' of 3' if reason else ''} conv + BN + ReLU"
    assert_same(model, stock, images(requires_grad=True))
    assert fused_calls == {"conv_bn_relu": 2}


def test_hooks_on_children_and_on_the_whole_fire(fused_calls):
    model, seen = fastres.convert(vgg()), []
    for name in ("3", "9", "13"):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
    model.register_forward_hook(lambda module, args, output: seen.append("whole"))
    model(images())
    assert seen == ["3", "9", "13", "whole"]
    assert fused_calls == {"conv_bn_relu": 2}


def test_where_no_triple_can_be_fused_it_is_stock(fused_calls, assert_same):
    stock = vgg().eval()
    model = fastres.convert(copy.deepcopy(stock))
    for network in (model, stock):
        for i in (0, 4, 8):
            network[i].register_forward_hook(hook)
    reasons = "0-2 run as modules: 0 has a hook; 4-6 run as modules: 4 has a hook; 8-10 run as modules: 8 has a hook"
    assert model.fused_reason() == reasons
    assert_same(model, stock, images())
    assert not fused_calls


def test_a_long_list_of_reasons_is_cut():
    layers = [layer for _ in range(5) for layer in (nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3), nn.ReLU())]
    with pytest.warns(UserWarning, match=r"0-2 .*; 3-5 .*; 6-8 run as modules: 7 is SyncBatchNorm.*; and 2 more \("):
        fastres.convert(nn.Sequential(*layers))


def test_slices_and_changes_of_the_list(fused_calls, assert_same):
    stock = vgg().eval()
    model = fastres.convert(copy.deepcopy(stock))
    front = model[:4]
    assert type(front) is type(model) and list(front._modules) == ["0", "1", "2", "3"]
    assert_same(front, stock[:4], images())
    assert fused_calls == {"conv_bn_relu": 1}
    assert model[5:8].fused_reason() == "no conv, batch norm and ReLU follow each other"
    assert_same(model[5:8], stock[5:8], torch.randn(2, 6, 4, 4, dtype=torch.float64))
    assert fused_calls == {"conv_bn_relu": 1}
    for network in (model, stock):
        del network[3]
        network.insert(0, Twice())
        network[-1] = nn.Linear(64, 2).double().requires_grad_(False)
        nn.init.ones_(network[-1].weight)
        nn.init.zeros_(network[-1].bias)
    assert_same(model, stock, images())
    assert fused_calls == {"conv_bn_relu": 4}
    assert type(model + stock) is nn.Sequential


def save_and_load(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class UserSequential(nn.Sequential):
    """With another signature, as people write it."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load])
@pytest.mark.parametrize("build", [vgg, lambda: UserSequential(4).double()], ids=["exact", "subclass"])
def test_copies_stay_fused_and_keep_the_backend(build, copier, fused_calls):
    model = fastres.convert(build(), backend="reference").eval()
    copied = copier(model)
    assert type(copied) is type(model) and copied.backend == "reference"
    x = images()
    assert torch.equal(copied(x), model(x))
    assert fused_calls == {"conv_bn_relu": 2 * len(triples(model))}
    assert type(fastres.revert(copied)) is type(build())
    assert "backend" not in copied.__dict__


def test_state_dict_keys_and_children_stay():
    model = vgg()
    children, keys = list(model.modules()), list(model.state_dict())
    fastres.convert(model)
    assert isinstance(model, nn.Sequential) and isinstance(model, FusedSequential)
    assert all(a is b for a, b in zip(model.modules(), children, strict=True))
    assert list(model.state_dict()) == keys
    model.load_state_dict(vgg().state_dict())


class OwnForward(UserSequential):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnOrder(UserSequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


class NoLayers(nn.Sequential):
    pass


@pytest.mark.parametrize("cls", [OwnForward, OwnOrder])
def test_a_subclass_with_a_forward_of_its_own_stays(cls):
    model = cls(4)
    with pytest.warns(UserWarning, match=f"{cls.__name__} has a forward of its own"):
        fastres.convert(model)
    assert type(model) is cls


def blocks_and_layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Bottleneck(8, 2))


@pytest.mark.parametrize(
    ("build", "paths"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), []),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)), []),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), []),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU()), []),
        (lambda: nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]), []),
        (NoLayers, []),
        (blocks_and_layers, ["3"]),
        (lambda: nn.Sequential(vgg()[:3], nn.Sequential(vgg()[:4], vgg()[4:7])), ["0", "1.0", "1.1"]),
        (lambda: nn.ModuleDict({"a": UserSequential(4), "b": Bottleneck(8, 2)}), ["a", "b"]),
    ],
)
def test_what_becomes_a_unit(build, paths):
    rows = fastres.explain(build()).rows
    assert [row.path for row in rows] == paths


def test_children_of_every_kind_are_just_called(fused_calls):
    """What a child gives is asked about before each triple, not only what the whole is given."""

    class Subclass(torch.Tensor):
        pass

    class Function(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    layers = list(vgg()[:3])
    stock = nn.Sequential(
        Function(lambda x: (x, 1)),
        Function(lambda pair: pair[0].as_subclass(Subclass)),
        *layers,
        Function(lambda x: x.as_subclass(torch.Tensor)[:, :3]),
        *copy.deepcopy(layers),
        Function(lambda x: {"features": x}),
    ).eval()
    model = fastres.convert(copy.deepcopy(stock))
    x = images()
    torch.testing.assert_close(model(x), stock(x), rtol=1e-12, atol=1e-12)
    assert fused_calls == {"conv_bn_relu": 1}


def test_an_input_that_is_no_tensor_goes_to_the_first_child(fused_calls):
    stock = nn.Sequential(collections.OrderedDict(read=nn.Identity(), **vgg()[:3]._modules)).eval()
    model = fastres.convert(copy.deepcopy(stock))
    with pytest.raises(TypeError) as ours:
        model({"image": images()})
    with pytest.raises(TypeError) as theirs:
        stock({"image": images()})
    assert str(ours.value) == str(theirs.value)
    assert not fused_calls


def test_an_empty_batch_and_meta_tensors(fused_calls):
    model = fastres.convert(vgg()).eval()
    assert model(images()[:0]).shape == (0, 3)
    assert not fused_calls
    x = torch.empty(2, 3, 8, 8, dtype=torch.float64, device="meta", requires_grad=True)
    model.train().to("meta")(x).sum().backward()
    assert x.grad.shape == x.shape and model[0].bias.grad.shape == (8,)
    assert fused_calls == {"conv_bn_relu": 3}


def test_what_follows_may_change_the_output_in_place(assert_same):
    """Which stock, whose ReLU saves its output, allows without a gradient only."""
    stock = nn.Sequential(*vgg()[:3], nn.Hardtanh(-1, 1)).eval()
    model = fastres.convert(copy.deepcopy(stock))
    model[3].inplace = True
    assert_same(model, stock, images(requires_grad=True))


def test_replicas_of_data_parallel(fused_calls, replicate):
    model = fastres.convert(vgg()).eval()
    x = images()
    replica = replicate(model)
    assert not replica[0]._parameters.get("bias")
    torch.testing.assert_close(replica(x), model(x), rtol=1e-12, atol=1e-12)
    replica(x).square().sum().backward()
    assert model[0].bias.grad.ne(0).any()
    assert fused_calls == {"conv_bn_relu": 9}


def test_functional_call_replaces_the_bias(fused_calls):
    model, x = fastres.convert(vgg()).eval(), images()
    stock = fastres.revert(copy.deepcopy(model))
    state = {"0.bias": torch.full((8,), 0.7, dtype=torch.float64)}
    ours, expected = (torch.func.functional_call(m, state, (x,)) for m in (model, stock))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert fused_calls == {"conv_bn_relu": 3}


def test_tracers_record_the_children(fused_calls):
    model, x = fastres.convert(vgg()).eval(), images()
    expected = fastres.revert(copy.deepcopy(model))(x)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == list(model._modules)
    program = torch.export.export(model, (x,))
    assert not any("fastres" in str(node.target) for node in program.graph.nodes)
    scripted = torch.jit.script(model)
    assert not fused_calls
    assert isinstance(model, FusedSequential)
    for recorded in (graph, program.module(), scripted):
        torch.testing.assert_close(recorded(x), expected, rtol=1e-10, atol=1e-12)


def test_autocast(fused_calls):
    model = fastres.convert(vgg().float())
    stock = fastres.revert(copy.deepcopy(model))
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(x), stock(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
    assert fused_calls == {"conv_bn_relu": 3}


def test_granularity_concerns_stages_only():
    model = nn.Sequential(vgg(), nn.Sequential(Bottleneck(16, 4), Bottleneck(16, 4)))
    fastres.revert(model)
    fastres.convert(model, granularity="block")
    assert isinstance(model[0], FusedSequential) and type(model[1]) is nn.Sequential


def test_strict_and_the_warning_see_layers_that_are_refused():
    model = nn.Sequential(vgg(), nn.Identity())
    model[0][5] = nn.SyncBatchNorm(6)
    with pytest.raises(ValueError, match=r"1 of 1 units run as stock modules, some of them in part: 0 .*4-6 run as"):
        fastres.convert(model, strict=True)
    assert type(model[0]) is nn.Sequential
    with pytest.warns(UserWarning, match="some of them in part"):
        fastres.convert(model)
    assert type(model[0]) is not nn.Sequential


def test_a_batch_norm_of_other_channels_is_named():
    model = fastres.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8), nn.ReLU()))
    for training in (True, False):
        with pytest.raises(
            ValueError, match=r"conv_bn_relu: bn must be of 4 channels, as the conv gives, is of \[\(8,\)"
        ):
            model.train(training)(torch.randn(2, 3, 6, 6))
