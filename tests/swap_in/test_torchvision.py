"""torchvision's ResNets converted: stock's numbers, weights both ways, and the tools that people use around them."""

from __future__ import annotations

import collections
import copy
import pickle

import pytest
import torch
from torch import nn

import fastres
from fastres.nn.fused import FusedModule

SHARED_MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "resnext50_32x4d",
)


class FusedOperators(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the fastres operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastres":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """One step of training: the output, every gradient, and what the model holds afterwards."""
    x = x.clone().requires_grad_()
    optimizer.zero_grad()
    logits = model(x)
    nn.functional.cross_entropy(logits, torch.arange(len(x))).backward()
    optimizer.step()
    results = {"output": logits.detach(), "gradient of x": x.grad}
    results |= {f"gradient of {name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
    return results | {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], relative: float) -> None:
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        difference = torch.linalg.vector_norm((ours[name] - expected).double())
        assert difference <= relative * torch.linalg.vector_norm(expected.double()), name


def build(torchvision_models, name: str) -> nn.Module:
    """The model in float64 with ten classes, its batch norms away from their initial values."""
    torch.manual_seed(0)
    model = getattr(torchvision_models, name)(num_classes=10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 8 * ["basic_block"]), ("resnet50", 16 * ["bottleneck"])], ids=["18", "50"]
)
def test_a_training_step_and_evaluation_equal_stock(torchvision_models, name, blocks):
    stock = build(torchvision_models, name)
    model = copy.deepcopy(stock)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4) for m in (model, stock)]
    assert fastres.convert(model, strict=True) is model
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with FusedOperators() as seen:
        ours = step(model, x, optimizers[0])
    units = ["stem", *blocks]
    assert seen.names == [f"{unit}_train" for unit in units] + [f"{unit}_bwd" for unit in reversed(units)]
    assert_same(ours, step(stock, x, optimizers[1]), 1e-9)
    with torch.no_grad(), FusedOperators() as seen:
        logits = model.eval()(x)
    assert seen.names == [f"{unit}_const" for unit in units]
    assert_same({"logits": logits}, {"logits": stock.eval()(x)}, 1e-9)


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_state_dict_keys_and_shapes_are_torchvisions(torchvision_models, name):
    with torch.device("meta"):
        theirs = getattr(torchvision_models, name)().state_dict()
        ours = fastres.models.create(name).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    assert list(ours) == list(theirs)


def test_the_same_seed_gives_torchvisions_initial_weights(torchvision_models):
    for options in ({}, {"zero_init_residual": True}):
        torch.manual_seed(7)
        theirs = torchvision_models.resnet18(num_classes=10, **options).state_dict()
        torch.manual_seed(7)
        ours = fastres.models.resnet18(num_classes=10, **options).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weights_go_both_ways_between_torchvision_and_fastres_models(torchvision_models, name):
    theirs = build(torchvision_models, name).eval()
    ours = fastres.models.create(name, num_classes=10).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_same({"logits": ours(x)}, {"logits": theirs(x)}, 1e-9)
        for parameter in ours.parameters():
            parameter.mul_(1.01)
        theirs.load_state_dict(ours.state_dict())
        assert_same({"logits": ours(x)}, {"logits": theirs(x)}, 1e-9)


@pytest.fixture
def resnet18(torchvision_models):
    return fastres.convert(torchvision_models.resnet18(num_classes=10)).eval()


def test_classes_are_torchvisions_still(torchvision_models, resnet18):
    stock_class = torchvision_models.resnet.BasicBlock
    assert isinstance(resnet18, torchvision_models.ResNet)
    assert all(isinstance(block, stock_class) for stage in (resnet18.layer1, resnet18.layer4) for block in stage)
    fastres.revert(resnet18)
    assert type(resnet18) is torchvision_models.ResNet
    assert type(resnet18.layer1[0]) is stock_class and type(resnet18.layer1) is nn.Sequential
    assert not any(isinstance(module, FusedModule) for module in resnet18.modules())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_fused(resnet18, copier):
    copied = copier(resnet18)
    assert [type(module) for module in copied.modules()] == [type(module) for module in resnet18.modules()]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), FusedOperators() as seen:
        assert torch.equal(copied(x), resnet18(x))
    assert len(seen.names) == 18


def test_hooks_on_the_stages_and_slices_of_them_work(resnet18):
    seen = []
    resnet18.layer2.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        resnet18(torch.randn(2, 3, 32, 32))
    assert seen == [(2, 128, 4, 4)]
    assert isinstance(resnet18.layer2[:1][0], FusedModule)
    assert type(resnet18.layer2) is type(resnet18.layer2[:1]) is fastres.nn.Stage


def test_a_hook_on_the_stem_runs_it_as_stock_and_leaves_the_blocks_fused(resnet18):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = resnet18(x)
        seen = []
        resnet18.relu.register_forward_hook(lambda module, args, output: seen.append(1))
        with FusedOperators() as operators:
            torch.testing.assert_close(resnet18(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [1]
    assert operators.names == 8 * ["basic_block_const"]
    row = fastres.explain(resnet18).rows[0]
    assert (row.path, row.unit, row.status, row.reason) == ("", "stem", "stock", "relu has a hook")


def test_feature_extractor_sees_stock_nodes(torchvision_models, resnet18):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    stock = fastres.revert(copy.deepcopy(resnet18))
    assert get_graph_node_names(resnet18) == get_graph_node_names(stock)
    x = torch.randn(2, 3, 32, 32)
    nodes = {"layer1.0.conv2": "inner", "layer3": "stage"}
    with torch.no_grad():
        ours, theirs = (create_feature_extractor(model, nodes)(x) for model in (resnet18, stock))
    assert all(torch.equal(ours[key], theirs[key]) for key in ("inner", "stage"))


def test_intermediate_layer_getter_keeps_the_blocks_fused_and_explain_names_its_stem(torchvision_models, resnet18):
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = IntermediateLayerGetter(resnet18, {"layer2": "features"})
    with torch.no_grad(), FusedOperators() as operators:
        backbone(torch.randn(2, 3, 32, 32))
    assert operators.names == 4 * ["basic_block_const"]
    stem, *rest = fastres.explain(backbone).rows
    assert (stem.unit, stem.status) == ("stem", "stock")
    assert stem.reason == "torchvision.models._utils.IntermediateLayerGetter is not a class that fastres knows"
    assert [row.path for row in rest] == ["layer1", "layer1.0", "layer1.1", "layer2", "layer2.0", "layer2.1"]
    assert [row.status for row in rest] == 6 * ["fused"]
    with pytest.raises(ValueError, match=r"1 of 5 units run as stock modules: the model \(stem\)"):
        fastres.convert(backbone, strict=True)


def test_quantizable_resnets_keep_their_own_forward(torchvision_models):
    from torchvision.models.quantization import resnet18

    model = resnet18(weights=None, quantize=False)
    classes = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match=r"QuantizableResNet has a forward of its own"):
        fastres.convert(model)
    assert [type(module) for module in model.modules()] == classes
    assert {row.status for row in fastres.explain(model).rows} == {"stock"}


def test_dilated_and_grouped_variants(torchvision_models):
    torch.manual_seed(0)
    model = torchvision_models.resnext50_32x4d(num_classes=10, replace_stride_with_dilation=[False, True, True])
    model = model.double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert_same({"logits": fastres.convert(model, strict=True)(x)}, {"logits": expected}, 1e-9)


def test_sync_batch_norm_conversion_gives_stock_blocks_with_the_reason(resnet18):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet18)
    rows = fastres.explain(model).rows
    assert {row.status for row in rows} == {"stock"}
    reason = "bn1 is SyncBatchNorm, not nn.BatchNorm2d"
    assert {row.reason for row in rows if row.unit != "stage"} == {reason}
    assert {row.reason for row in rows if row.unit == "stage"} == {f"its blocks run one by one: {reason}"}


def test_float32_training_follows_stock(torchvision_models):
    stock = build(torchvision_models, "resnet18").float()
    model = fastres.convert(copy.deepcopy(stock))
    losses = []
    for network in (model, stock):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=0.001, momentum=0.9
        )  # larger steps amplify rounding, stock's too
        losses.append([])
        for _ in range(4):
            x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
            loss = nn.functional.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3


def test_a_training_step_and_evaluation_of_vgg_equal_stock(torchvision_models):
    stock = build(torchvision_models, "vgg11_bn")
    stock.avgpool, stock.classifier = nn.Identity(), nn.Linear(512, 10).double()
    convs = [name for name, module in stock.named_modules() if isinstance(module, nn.Conv2d)]
    for name in convs:
        nn.init.normal_(stock.get_submodule(name).bias)
    model = copy.deepcopy(stock)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4) for m in (model, stock)]
    fastres.convert(model, strict=True)
    (row,) = fastres.explain(model).rows
    assert (row.path, row.unit, row.status, row.form) == ("features", "conv_bn_relu", "fused", "8 conv + BN + ReLU")
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        with FusedOperators() as seen:
            ours = step(model, x, optimizers[0])
        assert seen.names == 8 * ["conv_bn_relu_train"] + 8 * ["conv_bn_relu_bwd"]
        theirs = step(stock, x, optimizers[1])
        for name in convs:  # a bias in front of a norm has no gradient but stock's rounding
            assert ours.pop(f"gradient of {name}.bias").eq(0).all()
            assert theirs.pop(f"gradient of {name}.bias").abs().max() < 1e-10
        assert_same(ours, theirs, 1e-9)
    with torch.no_grad(), FusedOperators() as seen:
        logits = model.eval()(x)
    assert seen.names == 8 * ["conv_bn_relu_const"]
    assert_same({"logits": logits}, {"logits": stock.eval()(x)}, 1e-9)
    assert type(fastres.revert(model).features) is nn.Sequential


def test_conv_norm_activation_is_a_sequential_with_its_forward(torchvision_models):
    from torchvision.ops.misc import Conv2dNormActivation

    torch.manual_seed(0)
    stock = nn.Sequential(
        Conv2dNormActivation(3, 8, stride=2),
        Conv2dNormActivation(8, 8, activation_layer=nn.ReLU6),
        Conv2dNormActivation(8, 8, kernel_size=1, bias=True),
        Conv2dNormActivation(8, 8, norm_layer=None),
        Conv2dNormActivation(8, 8, activation_layer=None),
    ).double()
    model = fastres.convert(copy.deepcopy(stock), strict=True)
    assert [(row.path, row.form) for row in fastres.explain(model).rows] == [
        ("0", "1 conv + BN + ReLU"),
        ("2", "1 conv + BN + ReLU"),
    ]
    assert all(isinstance(child, Conv2dNormActivation) for child in model)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad(), FusedOperators() as seen:
        assert_same({"output": model(x)}, {"output": stock(x)}, 1e-10)
    assert seen.names == 2 * ["conv_bn_relu_train"]
    assert all(type(a) is type(b) for a, b in zip(fastres.revert(model).modules(), stock.modules(), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnets_units_are_its_stem_and_blocks(torchvision_models, name):
    with torch.device("meta"):
        model = getattr(torchvision_models, name)()
    units = collections.Counter(row.unit for row in fastres.explain(model).rows)
    block, count = {"resnet18": ("basic_block", 8), "resnet50": ("bottleneck", 16)}[name]
    assert (units["stem"], units[block], units["conv_bn_relu"]) == (1, count, 0)
    fastres.convert(model)
    sequentials = [module for path, module in model.named_modules() if path.endswith("downsample")]
    assert {type(module) for module in sequentials} == {nn.Sequential}
