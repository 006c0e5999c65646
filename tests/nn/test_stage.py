"""Stages: what is chained and what is called as a module, with stock's numbers, hooks and containers' ways."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

import fastres
from fastres.models.stages import make_stage
from fastres.nn import BasicBlock, Bottleneck, Stage, StockBottleneck

FOUR = 4
SEEN = []


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def note(module, *args):
    SEEN.append(type(module).__name__)


def make(block: str = "bottleneck", blocks: int = FOUR, **options) -> Stage:
    """A stage in float64 whose first block projects with stride 2, batch norms away from their initial values."""
    torch.manual_seed(0)
    stage = make_stage(block, 8, 4 if block == "bottleneck" else 10, blocks, 2, **options)[0].double()
    for bn in (module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
    return stage


def image(needs_grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 8, 9, 7, dtype=torch.float64, generator=generator).requires_grad_(needs_grad)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


CHANGES = {
    "nothing": (lambda s: None, {"stage": 1}),
    "forward hook on a block": (lambda s: s[1].register_forward_hook(note), {"bottleneck": 2, "stage": 1}),
    "forward pre-hook on a block": (lambda s: s[0].register_forward_pre_hook(note), {"bottleneck": 1, "stage": 1}),
    "backward hook on a block": (lambda s: s[3].register_full_backward_hook(note), {"bottleneck": 1, "stage": 1}),
    "backward pre-hook on a block": (
        lambda s: s[2].register_full_backward_pre_hook(note),
        {"bottleneck": 2, "stage": 1},
    ),
    "hook on a child": (lambda s: s[1].conv2.register_forward_hook(note), {"bottleneck": 1, "stage": 1}),
    "hook on a shortcut": (lambda s: s[0].downsample.register_forward_hook(note), {"bottleneck": 1, "stage": 1}),
    "hook on the stage": (lambda s: s.register_forward_hook(note), {"stage": 1}),
    "backward hook on the stage": (lambda s: s.register_full_backward_hook(note), {"stage": 1}),
    "another norm": (lambda s: setattr(s[2], "bn1", nn.GroupNorm(2, 4).double()), {"bottleneck": 1, "stage": 1}),
    "another class behind": (lambda s: s.append(nn.Tanh()), {"stage": 1}),
    "another class between": (lambda s: s.insert(2, nn.Tanh()), {"stage": 2}),
    # Of its block the forward pass runs twice.
    "a checkpoint wrapper": (lambda s: s.__setitem__(2, Checkpointed(s[2])), {"bottleneck": 3, "stage": 1}),
    "a forward on the instance": (
        lambda s: setattr(s[1], "forward", type(s[1]).forward.__get__(s[1])),
        {"bottleneck": 2, "stage": 1},
    ),
    "a block compiled by itself": (lambda s: s[1].compile(backend="eager"), {"bottleneck": 2, "stage": 1}),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_chained(change, training, fused_calls, stock_twin, run, assert_equal_in_float64):
    apply, calls = CHANGES[change]
    stage = make().train(training)
    stock = stock_twin(stage)
    apply(stock)
    expected = run(stock, image())
    fired = list(SEEN)
    SEEN.clear()
    apply(stage)
    assert_equal_in_float64(run(stage, image()), expected)
    assert len(SEEN) == len(fired) == ("hook" in change)
    assert fused_calls == calls


class Doubling(Bottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_called(fused_calls):
    stage, x = make().eval(), image(False)
    stage[2].__class__ = Doubling
    torch.testing.assert_close(stage(x), stage[3](2 * Bottleneck.forward(stage[2], stage[1](stage[0](x)))))
    assert fused_calls == {"stage": 1, "bottleneck": 2 + 4}


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_every_shortcut(block, shortcut, fused_calls, stock_twin, run, assert_equal_in_float64):
    stage = make(block, shortcut=shortcut)
    stock = stock_twin(stage)
    assert type(stock) is nn.Sequential
    assert_equal_in_float64(run(stage, image()), run(stock, image()))
    unit = {"basic": "basic_block"}.get(block, block)
    assert fused_calls == ({"stage": 1, unit: 1} if shortcut == "A" else {"stage": 1})


def test_frozen_blocks_and_norms(fused_calls, stock_twin, run, assert_equal_in_float64):
    stage = make()
    for block in stage[:2]:
        block.requires_grad_(False).eval()
    stage[3].bn2.eval()
    stock = stock_twin(stage)
    assert_equal_in_float64(run(stage, image(False)), run(stock, image(False)))
    assert all(parameter.grad is None for parameter in stage[:2].parameters())
    assert fused_calls == {"stage": 1}


def test_a_block_of_another_backend_ends_a_chain(fused_calls, stock_twin, run, assert_equal_in_float64):
    stage = make()
    stock = stock_twin(stage)
    stage[3].backend = stage[2].backend = "reference"
    assert stage.runs() == [["0", "1"], ["2", "3"]]
    assert_equal_in_float64(run(stage, image()), run(stock, image()))
    assert fused_calls == {"stage": 2}
    stage[2].backend = "auto"
    assert stage.runs() == [["0", "1", "2"], ["3"]]
    assert stage.alone_reasons() == {"3": "no neighbour to chain it to"}


@pytest.mark.parametrize("kind", ["tensor subclass", "empty", "torch.func", "global hook"])
def test_calls_that_the_guard_refuses_run_the_children(kind, fused_calls, stock_twin):
    stage = make().eval()
    x = image(False)
    stock = stock_twin(stage)
    if kind == "tensor subclass":
        x = x.as_subclass(type("Subclass", (torch.Tensor,), {}))
    elif kind == "empty":
        x = x[:0]
    if kind == "torch.func":
        ours, theirs = (torch.func.vmap(module)(x[None]) for module in (stage, stock))
    elif kind == "global hook":
        with torch.nn.modules.module.register_module_forward_hook(note):
            ours = stage(x)
        assert SEEN.count("Conv2d") == 13
        theirs = stock(x)
    else:
        ours, theirs = stage(x), stock(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert not fused_calls


def test_double_backward_raises():
    stage, x = make(), image()
    (gradient,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastres\.revert\(model\)"):
        gradient.square().sum().backward()


def test_it_is_a_sequential():
    stage = make()
    keys = list(stage.state_dict())
    assert keys == list(nn.Sequential(*stage).state_dict())
    assert isinstance(stage, nn.Sequential) and len(stage) == FOUR and stage[-1] is list(stage)[3]
    assert type(stage[1:3]) is Stage and list(stage[1:3]) == [stage[1], stage[2]]
    x = image(False)
    stage.eval()
    torch.testing.assert_close(stage[2:](stage[:2](x)), stage(x), rtol=1e-12, atol=1e-12)
    last = stage.pop(3)
    assert len(stage) == 3
    stage.append(last)
    assert list(stage.state_dict()) == keys
    other = make()
    other.load_state_dict(stage.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), stage.state_dict().values(), strict=True))


def save_and_load(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, copy.copy, save_and_load, lambda m: pickle.loads(pickle.dumps(m))], ids=range(4)
)
def test_copies_keep_class_and_granularity(copier, fused_calls):
    stage = make().eval()
    stage.granularity = "stage"
    copied = copier(stage)
    assert type(copied) is Stage and copied is not stage and copied.granularity == "stage"
    x = image(False)
    assert torch.equal(copied(x), stage(x))
    assert fused_calls == {"stage": 2}


def test_granularity(fused_calls):
    stage, x = make().eval(), image(False)
    outputs = []
    for granularity in fastres.nn.stage.GRANULARITIES:
        stage.granularity = granularity
        outputs.append(stage(x))
    assert fused_calls == {"stage": 2, "bottleneck": FOUR}
    assert all(torch.equal(outputs[0], output) for output in outputs)
    stage.granularity = "layer"
    with pytest.raises(ValueError, match="granularity='layer' is not known; use one of 'auto', 'block', 'stage'"):
        stage(x)


@pytest.fixture
def processes(monkeypatch):
    """A function that pretends that this is one of several processes."""

    def pretend(count: int):
        monkeypatch.setattr(distributed, "is_available", lambda: True)
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: count)

    return pretend


def chained(model) -> list[bool]:
    return [len(getattr(model, f"layer{i}").runs()) == 1 for i in (1, 2, 3, 4)]


def test_several_processes_chain_what_fits_a_bucket_of_gradients(processes):
    with torch.device("meta"):
        model = fastres.models.resnet50()
    assert chained(model) == [True] * 4
    processes(1)
    assert chained(model) == [True] * 4
    processes(2)
    assert chained(model) == [True, True, False, False]
    (reason,) = set(model.layer3.alone_reasons().values())
    assert reason == "several processes may reduce gradients, of which a chain would hold back 28 MB"
    row = next(row for row in fastres.explain(model).rows if row.path == "layer3")
    assert (row.status, row.reason) == ("by blocks", f"its blocks run one by one: {reason}")
    assert chained(copy.deepcopy(model).bfloat16()) == [True, True, True, False]
    model.layer4[:2].requires_grad_(False)
    assert chained(model) == [True, True, False, True]
    model.layer3.granularity = "stage"
    assert chained(model) == [True, True, True, True]


def test_a_large_stage_of_several_processes_runs_block_by_block(processes, monkeypatch, fused_calls):
    stage, x = make(), image()
    processes(2)
    monkeypatch.setattr(fastres.nn.stage, "BUCKET", 4000)
    stage(x).sum().backward()
    assert fused_calls == {"bottleneck": FOUR}


def test_jit_script_sees_a_sequential():
    stage, x = make().eval(), image(False)
    scripted = torch.jit.script(stage)
    torch.testing.assert_close(scripted(x), stage(x), rtol=1e-10, atol=1e-12)
    assert type(stage) is Stage and type(stage[0]) is Bottleneck


def test_fx_sees_the_children_of_the_blocks():
    stage = make().eval()
    graph = torch.fx.symbolic_trace(nn.Sequential(stage))
    targets = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert {"0.0.conv1", "0.0.downsample.0", "0.3.bn3"} <= targets
    x = image(False)
    torch.testing.assert_close(graph(x), stage(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_export_records_plain_operators(strict):
    stage, x = make().eval(), image(False)
    program = torch.export.export(stage, (x,), strict=strict)
    assert not any("fastres" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), stage(x), rtol=1e-10, atol=1e-12)


def test_data_parallel_replicas(fused_calls):
    stage, x = make().eval(), image(False)

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            replica._parameters[name] = None
            if parameter is not None:
                del replica._parameters[name]
                setattr(replica, name, parameter * 1)
        for name, child in module._modules.items():
            setattr(replica, name, replicate(child))
        return replica

    torch.testing.assert_close(replicate(stage)(x), stage(x), rtol=1e-12, atol=1e-12)
    assert fused_calls == {"stage": 2}


SEVERAL = [StockBottleneck(16, 4), StockBottleneck(16, 4), BasicBlock(16, 16)]


class TestConvert:
    def test_a_sequential_of_blocks_becomes_a_stage_and_goes_back(self):
        model = nn.ModuleDict({"layer": nn.Sequential(*copy.deepcopy(SEVERAL)), "other": nn.Sequential(nn.ReLU())})
        state = model.state_dict()
        fastres.convert(model)
        assert [type(module) for module in (*model["layer"], model["layer"])] == [
            Bottleneck,
            Bottleneck,
            BasicBlock,
            Stage,
        ]
        assert type(model["other"]) is nn.Sequential
        assert list(model.state_dict()) == list(state)
        fastres.revert(model)
        assert type(model["layer"]) is nn.Sequential and "granularity" not in model["layer"].__dict__
        assert type(model["layer"][0]) is StockBottleneck

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(StockBottleneck(16, 4)),
            nn.Sequential(StockBottleneck(16, 4), StockBottleneck(16, 4), nn.ReLU()),
            type("Own", (nn.Sequential,), {})(StockBottleneck(16, 4), StockBottleneck(16, 4)),
        ],
        ids=["one block", "something else too", "another class"],
    )
    def test_what_is_no_stage(self, model):
        model = copy.deepcopy(model)
        before = type(model)
        fastres.convert(model)
        assert type(model) is before
        assert all(row.unit == "bottleneck" for row in fastres.explain(model).rows)

    @pytest.mark.parametrize("granularity", ["auto", "stage", "block"])
    def test_granularity(self, granularity):
        stock, built = nn.Sequential(*copy.deepcopy(SEVERAL)), make()
        for model in (stock, built):
            fastres.convert(model, granularity=granularity)
        assert type(stock) is (nn.Sequential if granularity == "block" else Stage)
        assert type(built) is Stage and built.granularity == granularity
        assert getattr(stock, "granularity", "block") == granularity
        rows = [fastres.explain(model).rows[0] for model in (stock, built)]
        if granularity != "block":
            assert [(row.status, row.form, row.reason) for row in rows] == [
                ("fused", "3 blocks in one chain", ""),
                ("fused", "4 blocks in one chain", ""),
            ]
        else:
            assert [row.status for row in rows] == ["by blocks", "by blocks"]
            assert (
                rows[0].reason
                == "nn.Sequential runs its blocks one by one: fastres.convert(model, granularity='auto') chains them"
            )
            assert rows[1].reason == "its blocks run one by one: granularity is 'block'"

    def test_filter_fn_sees_the_stage_and_its_blocks(self, fused_calls):
        model, seen = nn.Sequential(*copy.deepcopy(SEVERAL)), []
        fastres.convert(model, filter_fn=lambda module, path: seen.append(path) or path != "1")
        assert seen == ["", "0", "1", "2"]
        assert type(model) is Stage and type(model[1]) is StockBottleneck
        model(torch.randn(2, 16, 5, 5))
        assert fused_calls == {"bottleneck": 1, "basic_block": 1}
        model = fastres.convert(nn.Sequential(*copy.deepcopy(SEVERAL)), filter_fn=lambda module, path: path != "")
        assert type(model) is nn.Sequential and type(model[1]) is Bottleneck

    def test_warnings_count_blocks_and_not_their_stage(self):
        model = nn.Sequential(*copy.deepcopy(SEVERAL))
        model[1].relu = nn.GELU()
        with pytest.warns(UserWarning, match=r"1 of 3 units run as stock modules: 1 \(bottleneck\): relu is GELU"):
            fastres.convert(model)
        with pytest.raises(ValueError, match="1 of 3 units"):
            fastres.convert(model, strict=True)

    def test_explain_names_the_blocks_that_run_by_themselves(self):
        stage = make(blocks=6)
        stage[2].conv1.register_forward_hook(note)
        stage[3].register_forward_hook(note)
        row, *blocks = fastres.explain(stage).rows
        assert (row.path, row.unit, row.status, row.form) == ("", "stage", "partly", "2 and 2 blocks in chains")
        assert row.reason == "2 runs by itself: conv1 has a hook; 3 runs by itself: the block has a hook"
        assert [block.status for block in blocks] == ["fused", "fused", "stock", "fused", "fused", "fused"]
        assert "6 units: 5 fused, 1 stock. 1 stage: 1 partly." in str(fastres.explain(stage))


class TestAsASequential:
    """What users of nn.Sequential do with one, on a stage and on conv + BN + ReLU."""

    @pytest.fixture(params=["stage", "layers"])
    def stock(self, request):
        if request.param == "stage":
            return nn.Sequential(*(fastres.revert(Bottleneck(16, 4)) for _ in range(3)))
        return nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def test_the_input_has_its_name(self, stock):
        model, x = fastres.convert(copy.deepcopy(stock)), torch.randn(2, 16, 6, 6)
        assert torch.equal(model(input=x), model(x))
        assert next(iter(torch.fx.symbolic_trace(model).graph.nodes)).name == "input_1"

    def test_slices_have_the_settings(self, stock):
        model = fastres.convert(stock, backend="reference", granularity="stage")
        assert [getattr(model[:2], name) for name in type(model).settings] == [
            {"backend": "reference", "granularity": "stage"}[name] for name in type(model).settings
        ]

    def test_absent_and_lazy_children(self, stock):
        stock.append(nn.LazyConv2d(3, 1))
        stock._modules["none"] = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explanation = fastres.explain(fastres.convert(stock))
        assert {row.status for row in explanation.rows} == {"fused"} and str(explanation)

    @pytest.mark.parametrize("name", ["backend", "form", "granularity", "runs"])
    def test_names_of_its_own_stay_its_own(self, stock, name):
        stock.add_module(name, nn.Identity())
        before = copy.deepcopy(stock)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            str(fastres.explain(fastres.convert(stock)))
        assert list(fastres.revert(stock).state_dict()) == list(before.state_dict())
        assert type(getattr(stock, name)) is nn.Identity


def test_a_block_with_a_fused_forward_of_its_own_is_called():
    class Doubled(Bottleneck):
        def fused_forward(self, x):
            return 2 * super().fused_forward(x)

    stage, x = Stage(Doubled(16, 4), Bottleneck(16, 4)), torch.randn(2, 16, 6, 6)
    assert torch.equal(stage(x), stage[1](stage[0](x)))
    assert "Doubled has a fused forward of its own" in stage.alone_reasons()["0"]
