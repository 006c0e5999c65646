"""torch.compile sees one operator per unit and direction, in one graph."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastres
from fastres.models.stages import make_stage
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU2d, Projection, Stem, ZeroPadShortcut, projection_shortcut

MODULES = {
    "basic_block": lambda: BasicBlock(4, 6, 2, ZeroPadShortcut(4, 6, 2)),
    "bottleneck": lambda: Bottleneck(4, 2, 2, projection_shortcut(4, 8, 2)),
    "conv_bn_relu": lambda: ConvBNReLU2d(4, 6),
    "projection": lambda: Projection(4, 6, 2),
    "stem": lambda: Stem(4, 6),
}


class Graphs:
    """An aot_autograd backend that keeps the graphs which it is given and runs them as they are."""

    def __init__(self):
        torch._dynamo.reset()
        self.forward, self.backward = [], []
        self.backend = aot_autograd(fw_compiler=self.keep(self.forward), bw_compiler=self.keep(self.backward))

    @staticmethod
    def keep(graphs):
        def compiler(graph, inputs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    @staticmethod
    def fused_operators(graph) -> collections.Counter:
        """Names of the fastres operators that the graph calls, also through the wrapper for mutated arguments."""
        operators = [op for node in graph.graph.nodes for op in (node.target, *node.args[:1])]
        return collections.Counter(
            op._opname for op in operators if isinstance(op, torch._ops.OpOverload) and op.namespace == "fastres"
        )

    @staticmethod
    def masked_inputs(graph) -> list[bool]:
        """Of each block's backward in the graph, whether it masks the gradient of its input for the one in front."""
        backward = (torch.ops.fastres.basic_block_bwd.default, torch.ops.fastres.bottleneck_bwd.default)
        nodes = [node for node in graph.graph.nodes if node.target in backward]
        schema = [argument.name for argument in backward[0]._schema.arguments]
        return [node.args[schema.index("mask_input")] for node in nodes]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("unit", MODULES)
def test_the_fused_operators_are_in_one_graph(unit, training, stock_twin, run, assert_equal_in_float64):
    torch.manual_seed(0)
    module = MODULES[unit]().double().train(training)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    stock = stock_twin(module)
    graphs = Graphs()
    module.compile(backend=graphs.backend, fullgraph=True)
    assert_equal_in_float64(run(module, x), run(stock, x))
    assert len(graphs.forward) == len(graphs.backward) == 1
    forward, backward = (graphs.fused_operators(side[0]) for side in (graphs.forward, graphs.backward))
    assert forward == {f"{unit}_{'train' if training else 'const'}": 1}
    assert backward == {f"{unit}_bwd": 1}


def test_changes_after_compilation_are_noticed(stock_twin, run, assert_equal_in_float64):
    torch.manual_seed(0)
    module = MODULES["bottleneck"]().double()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    stock = stock_twin(module)
    graphs = Graphs()
    module.compile(backend=graphs.backend, fullgraph=True)
    expected = []
    for change in (
        lambda block: None,
        lambda block: block.bn2.eval(),
        lambda block: block.conv1.weight.requires_grad_(False),
        lambda block: nn.utils.parametrizations.weight_norm(block.conv3),
    ):
        change(module)
        change(stock)
        module.zero_grad()
        stock.zero_grad()
        assert_equal_in_float64(run(module, x), run(stock, x))
        expected.append(graphs.fused_operators(graphs.forward[-1]))
    assert expected == [{"bottleneck_train": 1}] * 3 + [{}]


def test_a_block_that_cannot_be_fused_compiles_in_one_graph(stock_twin, run, assert_equal_in_float64):
    module = Bottleneck(8, 2, norm_layer=lambda channels: nn.GroupNorm(2, channels)).double()
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    stock = stock_twin(module)
    graphs = Graphs()
    module.compile(backend=graphs.backend, fullgraph=True)
    assert_equal_in_float64(run(module, x), run(stock, x))
    assert graphs.fused_operators(graphs.forward[0]) == {}


def test_a_dynamic_batch_needs_no_graph_per_size(stock_twin, run, assert_equal_in_float64):
    module = MODULES["bottleneck"]().double()
    stock = stock_twin(module)
    graphs = Graphs()
    module.compile(backend=graphs.backend, fullgraph=True)
    for batch in (4, 6, 7, 9, 5):
        module.zero_grad()
        stock.zero_grad()
        x = torch.randn(batch, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        assert_equal_in_float64(run(module, x), run(stock, x))
    assert len(graphs.forward) == 2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", ["all", "a frozen block in front", "one by itself"])
def test_a_stage_is_one_graph_of_its_blocks(form, training, stock_twin, run, assert_equal_in_float64):
    torch.manual_seed(0)
    stage = make_stage("bottleneck", 4, 2, 3, 2)[0].double().train(training)
    if form == "a frozen block in front":
        stage[0].requires_grad_(False)
    if form == "one by itself":
        stage[1].bn1 = nn.GroupNorm(1, 2).double()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=form == "all")
    stock = stock_twin(stage)
    graphs = Graphs()
    stage.compile(backend=graphs.backend, fullgraph=True)
    assert_equal_in_float64(run(stage, x), run(stock, x))
    assert len(graphs.forward) == len(graphs.backward) == 1
    forward, backward = (graphs.fused_operators(side[0]) for side in (graphs.forward, graphs.backward))
    blocks = 2 if form == "one by itself" else 3
    assert forward == {f"bottleneck_{'train' if training else 'const'}": blocks}
    assert backward == {"bottleneck_bwd": blocks - (form == "a frozen block in front")}


def test_a_stage_follows_the_batch_and_its_blocks(stock_twin, run, assert_equal_in_float64):
    stage = make_stage("basic", 4, 6, 3, 2)[0].double()
    stock = stock_twin(stage)
    graphs = Graphs()
    stage.compile(backend=graphs.backend, fullgraph=True)

    def compare(batch: int) -> None:
        for module in (stage, stock):
            module.zero_grad()
        x = torch.randn(batch, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        assert_equal_in_float64(run(stage, x), run(stock, x))

    for batch in (4, 6, 7, 5):
        compare(batch)
    assert len(graphs.forward) == 2
    assert graphs.masked_inputs(graphs.backward[-1]) == [True, True, False]
    for module in (stage, stock):
        module[1].bn1.eval()
        module[2].conv2.weight.requires_grad_(False)
    compare(4)
    stage.granularity = "block"
    compare(4)
    assert graphs.masked_inputs(graphs.backward[-1]) == [False, False, False]


def test_a_stage_asks_torch_distributed_in_one_graph(tmp_path, monkeypatch, run):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo, which the CPU process group needs")
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)

    def masked_inputs():
        stage = make_stage("basic", 4, 6, 3, 2)[0].double()
        graphs = Graphs()
        stage.compile(backend=graphs.backend, fullgraph=True)
        run(stage, x)
        assert [graphs.fused_operators(graph) for graph in graphs.forward] == [{"basic_block_train": 3}]
        return graphs.masked_inputs(graphs.backward[0])

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr("fastres.nn.stage.BUCKET", 1)
        assert masked_inputs() == [True, True, False]
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert masked_inputs() == [False, False, False]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_sequential_has_an_operator_for_each_conv_bn_relu(training, run, assert_equal_in_float64):
    torch.manual_seed(0)
    stock = nn.Sequential(
        *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2),
        *(nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5), nn.ReLU6()),
    ).double()
    stock.train(training)
    for conv in stock[0], stock[7]:
        conv.bias.requires_grad_(not training)  # in training its gradient is zero but for rounding
    model = fastres.convert(copy.deepcopy(stock))
    graphs = Graphs()
    model.compile(backend=graphs.backend, fullgraph=True)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    for batch in (x, x[:2].detach().requires_grad_()):
        model.zero_grad()
        stock.zero_grad()
        assert_equal_in_float64(run(model, batch), run(stock, batch))
    kind = "train" if training else "const"
    assert graphs.fused_operators(graphs.forward[0]) == {f"conv_bn_relu_{kind}": 2}
    assert graphs.fused_operators(graphs.backward[0]) == {"conv_bn_relu_bwd": 2}
    model[4].register_forward_hook(lambda *args: None)
    torch._dynamo.reset()
    model(x)
    assert graphs.fused_operators(graphs.forward[-1]) == {f"conv_bn_relu_{kind}": 1}
