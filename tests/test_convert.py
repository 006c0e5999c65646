"""convert, revert and explain on modules of fastres itself and of classes that it does not know."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastres
from fastres.nn import Bottleneck, ConvBNReLU2d, StockBottleneck, StockConvBNReLU2d, projection_shortcut


def hook(*args):
    pass


@pytest.fixture
def model() -> nn.Sequential:
    """Three stock units, the second with a projection."""
    torch.manual_seed(0)
    return nn.Sequential(
        StockConvBNReLU2d(3, 8),
        StockBottleneck(8, 4, downsample=projection_shortcut(8, 16)),
        StockBottleneck(16, 4),
        nn.Flatten(),
    )


def statuses(model: nn.Module) -> list[str]:
    return [row.status for row in fastres.explain(model).rows]


def test_round_trip_is_in_place(model):
    children, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    assert statuses(model) == ["stock"] * 3
    assert fastres.convert(model) is model
    assert [type(child) for child in model[:3]] == [ConvBNReLU2d, Bottleneck, Bottleneck]
    assert statuses(model) == ["fused"] * 3
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert fastres.revert(model) is model
    assert [type(child) for child in model[:3]] == [StockConvBNReLU2d, StockBottleneck, StockBottleneck]
    assert all(a is b for a, b in zip(model.modules(), children, strict=True))
    assert not any("backend" in module.__dict__ for module in model.modules())


def test_a_model_that_is_itself_a_block():
    block = StockBottleneck(8, 2)
    assert type(fastres.convert(block)) is Bottleneck
    assert [row.path for row in fastres.explain(block).rows] == [""]
    assert type(fastres.revert(block)) is StockBottleneck


def test_converting_again_changes_the_backend_only(model):
    fastres.convert(model)
    classes = [type(module) for module in model.modules()]
    fastres.convert(model, backend="reference")
    assert [type(module) for module in model.modules()] == classes
    assert {module.backend for module in model[:3]} == {"reference"}
    assert all("reference: reference" == row.backend for row in fastres.explain(model).rows)


def test_the_optimizer_goes_on(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for step, change in enumerate((lambda m: m, fastres.convert, fastres.revert)):
        change(model)
        x = torch.randn(2, 3, 6, 6)
        for network, stepper in ((model, optimizer), (twin, twin_optimizer)):
            stepper.zero_grad()
            network(x).square().mean().backward()
            stepper.step()
        for ours, stock in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6, msg=f"step {step}")


def test_state_dicts_load_both_ways(model):
    stock = copy.deepcopy(model)
    fastres.convert(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    stock.load_state_dict(model.state_dict())
    other = fastres.convert(copy.deepcopy(stock))
    other.load_state_dict(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_filter_fn_gets_the_block_and_its_path(model):
    seen = []
    fastres.convert(model, filter_fn=lambda module, path: seen.append((type(module), path)) or path != "1")
    assert seen == [(StockConvBNReLU2d, "0"), (StockBottleneck, "1"), (StockBottleneck, "2")]
    assert [type(child) for child in model[:3]] == [ConvBNReLU2d, StockBottleneck, Bottleneck]
    assert fastres.explain(model).rows[1].reason == "not converted: call fastres.convert(model)"


def test_strict_lists_what_stays_and_changes_nothing(model):
    model[1].conv2.register_forward_hook(hook)
    model[2].bn1 = nn.GroupNorm(2, 4)
    with pytest.raises(ValueError) as error:
        fastres.convert(model, strict=True)
    assert str(error.value) == (
        "convert: 2 of 3 units run as stock modules: 1 (bottleneck): conv2 has a hook; "
        "2 (bottleneck): bn1 is GroupNorm, not nn.BatchNorm2d (fastres.explain(model) lists every unit)"
    )
    assert type(model[0]) is StockConvBNReLU2d


def test_without_strict_it_warns_once_and_fuses_the_rest(model):
    handle = model[1].conv2.register_forward_hook(hook)
    with pytest.warns(UserWarning, match=r"1 of 3 units .*: 1 \(bottleneck\): conv2 has a hook") as seen:
        fastres.convert(model)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert statuses(model) == ["fused", "stock", "fused"]
    handle.remove()
    assert statuses(model) == ["fused"] * 3


def test_a_long_list_of_reasons_is_cut():
    model = nn.Sequential(*(StockBottleneck(8, 2) for _ in range(7)))
    for block in model:
        block.relu = nn.GELU()
    with pytest.warns(UserWarning, match="7 of 7 units .*; 4 .*; and 2 more"):
        fastres.convert(model)


def test_nothing_to_fuse_is_said():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="fastres.convert: Sequential has nothing to fuse"):
        assert fastres.convert(model) is model
    with pytest.raises(ValueError, match="convert: Sequential has nothing to fuse"):
        fastres.convert(model, strict=True)
    assert str(fastres.explain(model)).startswith("Sequential has nothing to fuse: no block or stem")


def test_a_fused_model_converts_without_a_warning():
    model = fastres.models.cifar_resnet20()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastres.convert(model, strict=True)


class LookAlike(nn.Module):
    """A block of an unknown class, with the names that everybody uses."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)


class OwnForward(StockBottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


class SameForward(StockBottleneck):
    pass


def test_unknown_classes_are_named_and_left_alone():
    model = nn.Sequential(LookAlike(), OwnForward(8, 2))
    with pytest.warns(UserWarning, match="2 of 2 units run as stock modules"):
        fastres.convert(model)
    assert [type(module) for module in model] == [LookAlike, OwnForward]
    rows = fastres.explain(model).rows
    assert [row.unit for row in rows] == ["basic_block", "bottleneck"]
    assert rows[0].reason.endswith("LookAlike is not a class that fastres knows")
    assert rows[1].reason.endswith("OwnForward has a forward of its own")


def test_a_subclass_that_keeps_the_forward_is_fused():
    block = fastres.convert(SameForward(8, 2))
    assert isinstance(block, SameForward)
    assert statuses(block) == ["fused"]
    assert type(fastres.revert(block)) is SameForward


def test_a_forward_on_the_instance_is_left_alone():
    block = StockBottleneck(8, 2)
    block.forward = lambda x: x
    with pytest.warns(UserWarning, match="its forward was replaced on the instance"):
        fastres.convert(block)
    assert type(block) is StockBottleneck


class UserModule(Bottleneck):
    """A subclass of a fused class: there is no stock class that revert could name."""


def test_revert_refuses_a_subclass_of_a_fused_class_and_changes_nothing():
    model = nn.Sequential(ConvBNReLU2d(3, 8), UserModule(8, 2))
    with pytest.raises(ValueError, match="revert: 1 is UserModule: a subclass has no stock class to go back to"):
        fastres.revert(model)
    assert type(model[0]) is ConvBNReLU2d


def test_revert_inside_a_wrapper(model):
    wrapper = nn.DataParallel(fastres.convert(model))
    fastres.revert(wrapper)
    assert [type(child) for child in model[:3]] == [StockConvBNReLU2d, StockBottleneck, StockBottleneck]
    fastres.convert(wrapper)
    assert [row.path for row in fastres.explain(wrapper).rows] == ["module.0", "module.1", "module.2"]


@pytest.mark.parametrize("function", [fastres.convert, fastres.revert])
def test_a_compiled_model_is_refused(model, function):
    compiled = torch.compile(fastres.convert(model), backend="eager")
    with pytest.raises(ValueError, match=f"call {function.__name__} first, then torch.compile"):
        function(compiled)


def test_sharded_models_are_refused_and_converted_ones_shard(model, tmp_path, monkeypatch):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo, which the CPU process group needs")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model[1], mesh=mesh)
        with pytest.raises(ValueError, match=r"1 \(bottleneck\): it is sharded already; convert the model before"):
            fastres.convert(model)
        assert type(model[0]) is StockConvBNReLU2d
        block = fastres.convert(StockBottleneck(8, 2))
        fsdp.fully_shard(block, mesh=mesh)
        with pytest.raises(ValueError, match="FSDPBottleneck: revert before fully_shard"):
            fastres.revert(block)
        assert "DTensor, not a plain tensor" in fastres.explain(block).rows[0].reason
        assert "explain a model before sharding it" in fastres.explain(block).notes[1]
        calls = []
        fused = fastres.functional.bottleneck
        monkeypatch.setattr(fastres.functional, "bottleneck", lambda *a, **k: calls.append(1) or fused(*a, **k))
        block(torch.randn(2, 8, 4, 4)).sum().backward()
        assert calls == [1]
        assert block.conv1.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_unknown_granularity(model):
    with pytest.raises(ValueError, match="granularity='layer' is not known; use one of 'auto', 'block', 'stage'"):
        fastres.convert(model, granularity="layer")


def test_unknown_backend(model):
    with pytest.raises(ValueError, match="backend='cudnn' is not known; use one of 'auto'"):
        fastres.convert(model, backend="cudnn")


def test_a_backend_that_cannot_run_raises_and_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(fastres.backends, "reason", {"triton": "there is no GPU"}.get)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on this machine: there is no GPU"):
        fastres.convert(model, backend="triton")
    assert type(model[0]) is StockConvBNReLU2d


def test_explain_says_why_a_backend_fails(model, monkeypatch):
    fastres.convert(model.double())
    model[1].backend = "triton"
    rows = fastres.explain(model).rows
    assert rows[1].backend == "triton"
    assert "triton" in rows[1].reason
    assert rows[2].reason == ""


def test_the_environment_variable_shows(model, monkeypatch):
    fastres.convert(model)
    monkeypatch.setenv("FASTRES_BACKEND", "reference")
    assert {row.backend for row in fastres.explain(model).rows} == {"reference: reference"}


def test_explain_tells_a_shortcut_that_runs_by_itself(model):
    fastres.convert(model)
    model[1].downsample[1].register_forward_hook(hook)
    row = fastres.explain(model).rows[1]
    assert row.status == "partly"
    assert row.reason == "the shortcut runs as its own module: downsample[1] has a hook"


def test_explain_tells_the_form_of_a_block_and_why():
    pytest.importorskip("triton")
    shortcut = projection_shortcut(1024, 2048)
    model = nn.Sequential(Bottleneck(1024, 512, downsample=shortcut), Bottleneck(2048, 512), ConvBNReLU2d(2048, 8))
    assert [row.form for row in fastres.explain(model).rows] == ["Gram-folded, projection too", "Gram-folded", ""]
    on_gpu = [row.form for row in fastres.explain(model, dtype=torch.bfloat16, device="meta").rows]
    assert on_gpu[0].startswith("Gram-folded, projection stored: ") and on_gpu[1:] == ["Gram-folded", ""]
    in_float32 = [row.form for row in fastres.explain(model, device="meta").rows]
    assert in_float32[:2] == ["convs stored: products of float32 are the library's"] * 2
    model[0].downsample[1].register_forward_hook(hook)
    assert fastres.explain(model).rows[0].form == "Gram-folded", "the shortcut runs by itself"


def test_explain_with_a_shape_leaves_the_model_as_it_was(model):
    fastres.convert(model)
    before = copy.deepcopy(model.state_dict())
    rows = fastres.explain(model, (2, 3, 9, 7)).rows
    assert [row.input for row in rows] == [(2, 3, 9, 7), (2, 8, 9, 7), (2, 16, 9, 7)]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"explain: the model does not take an input of input_shape=\(2, 4, 9, 7\)"):
        fastres.explain(model, (2, 4, 9, 7))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_explanation_prints_an_aligned_table(model):
    fastres.convert(model.to(memory_format=torch.channels_last))
    model.append(nn.Conv2d(3, 4, 3))
    model[2].conv3.register_forward_hook(hook)
    head, rule, *rows, blank, counts, outside = str(fastres.explain(model, None)).splitlines()
    assert head.split() == ["path", "unit", "status", "backend", "form", "reason"]
    assert set(rule) == {"-", " "}
    starts = [index for index, char in enumerate(rule) if char == "-" and (index == 0 or rule[index - 1] == " ")]
    assert all(row[start - 1] == " " for row in rows for start in starts[1:] if len(row) > start)
    assert rows[2].endswith("conv3 has a hook")
    assert counts == "3 units: 2 fused, 1 stock."
    assert outside == "Outside these units, run as they are: convolutions: 1, batch norms: 0."


def layers(cin: int, cout: int) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]


@pytest.fixture
def network() -> nn.Module:
    """Three conv + BN + ReLU in a row, an nn.Sequential in another, and one beside residual blocks."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "features": nn.Sequential(*layers(3, 4), *layers(4, 4), nn.MaxPool2d(2), *layers(4, 4), nn.Conv2d(4, 4, 1)),
            "nested": nn.Sequential(nn.Sequential(*layers(4, 4)), nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))),
            "blocks": nn.Sequential(*layers(8, 8), StockBottleneck(8, 2)),
        }
    )


def test_sequentials_with_conv_bn_relu_are_units_there_and_back(network):
    children = list(network.modules())
    classes = [type(module) for module in children]
    assert [(row.path, row.unit, row.status) for row in fastres.explain(network).rows] == [
        ("features", "conv_bn_relu", "stock"),
        ("nested.0", "conv_bn_relu", "stock"),
        ("blocks.3", "bottleneck", "stock"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastres.convert(network, strict=True, backend="reference")
    changed = [
        name for (name, child), cls in zip(network.named_modules(), classes, strict=True) if type(child) is not cls
    ]
    assert changed == ["features", "nested.0", "blocks.3"]
    rows = fastres.explain(network).rows
    assert [row.status for row in rows] == ["fused"] * 3
    assert [row.form for row in rows[:2]] == ["3 conv + BN + ReLU", "1 conv + BN + ReLU"]
    assert {row.backend for row in rows} == {"reference: reference"}
    fastres.revert(network)
    assert [type(module) for module in network.modules()] == classes
    assert all(a is b for a, b in zip(network.modules(), children, strict=True))
    assert not any("backend" in module.__dict__ for module in network.modules())


def test_explain_counts_the_layers_of_a_sequential_once(network):
    fastres.convert(network)
    # A 1x1 in features, a projection, and a conv + BN + ReLU beside blocks.
    outside = "Outside these units, run as they are: convolutions: 3, batch norms: 2."
    assert outside in fastres.explain(network).notes
    network["features"][4].register_forward_hook(hook)
    network["nested"][0][1] = nn.SyncBatchNorm(4)
    explanation = fastres.explain(network)
    assert outside in explanation.notes, "a row tells of these"
    features, nested, _ = explanation.rows
    assert (features.status, features.form) == ("partly", "2 of 3 conv + BN + ReLU")
    assert features.reason == "3-5 run as modules: 4 has a hook"
    assert (nested.status, nested.form) == ("stock", "")
    assert nested.reason == "0-2 run as modules: 1 is SyncBatchNorm, not nn.BatchNorm2d"
    with pytest.raises(
        ValueError, match=r"2 of 3 units run as stock modules, some .* nested.0 \(conv_bn_relu\): 0-2 run as"
    ):
        fastres.convert(network, strict=True)


def test_shapes_of_sequentials_and_a_filter_on_them(network):
    model = nn.Sequential(network["features"], network["nested"])
    fastres.convert(model, filter_fn=lambda module, path: path != "1.0")
    rows = fastres.explain(model, (2, 3, 8, 6)).rows
    assert [(row.path, row.status, row.input) for row in rows] == [
        ("0", "fused", (2, 3, 8, 6)),
        ("1.0", "stock", (2, 4, 4, 3)),
    ]
    assert type(model[1][0]) is nn.Sequential


def test_a_sharded_sequential_is_refused(network, monkeypatch):
    monkeypatch.setattr(fastres.conversion, "_is_sharded", lambda module: module is network["features"])
    with pytest.raises(ValueError, match=r"features \(conv_bn_relu\): it is sharded already"):
        fastres.convert(network)
