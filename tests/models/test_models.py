"""The model families: sizes as published, shortcut options, initial weights, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastres
from fastres import models
from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU2d, ZeroPadShortcut


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layers_with_weights(model: nn.Module) -> int:
    """How He et al. count depth: convolutions and linear layers, shortcuts apart."""
    named = model.named_modules()
    return sum(isinstance(module, (nn.Conv2d, nn.Linear)) for name, module in named if "downsample" not in name)


@pytest.mark.parametrize("name", models.names())
def test_depth_is_in_the_name(name):
    with torch.device("meta"):
        model = models.create(name)
    depth = int("".join(char for char in name.split("_")[1 if name[:5] in ("cifar", "wide_") else 0] if char.isdigit()))
    assert layers_with_weights(model) == depth


# He et al., "Deep Residual Learning for Image Recognition" (2015), table 6, in millions.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar_resnet20", 0.27),
        ("cifar_resnet32", 0.46),
        ("cifar_resnet44", 0.66),
        ("cifar_resnet56", 0.85),
        ("cifar_resnet110", 1.7),
    ],
)
def test_cifar_parameters_are_the_papers(name, millions):
    with torch.device("meta"):
        assert round(parameters(models.create(name)) / 1e6, len(str(millions).split(".")[1])) == millions


# torchvision's documentation of its weights, num_params.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11689512),
        ("resnet34", 21797672),
        ("resnet50", 25557032),
        ("resnet101", 44549160),
        ("resnet152", 60192808),
        ("wide_resnet50_2", 68883240),
        ("resnext50_32x4d", 25028904),
    ],
)
def test_imagenet_parameters_are_torchvisions(name, count):
    with torch.device("meta"):
        assert parameters(models.create(name)) == count


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_option_a_costs_no_parameters_against_the_plain_network(depth):
    with torch.device("meta"):
        plain, residual = models.create(f"cifar_plain{depth}"), models.create(f"cifar_resnet{depth}")
    assert parameters(plain) == parameters(residual)


def test_options_b_and_c_add_exactly_their_projections():
    with torch.device("meta"):
        a, b, c = (parameters(models.cifar_resnet20(shortcut=option)) for option in "ABC")
    projections = [16 * 32 + 2 * 32, 32 * 64 + 2 * 64]  # a 1x1 conv, gamma and beta
    same = [width * width + 2 * width for width in (16, 32, 64)]
    assert b - a == sum(projections)
    assert c - b == 3 * same[0] + 2 * same[1] + 2 * same[2]


def test_options_place_their_shortcuts():
    def kinds(option):
        blocks = [m for m in models.cifar_resnet20(shortcut=option).modules() if isinstance(m, BasicBlock)]
        return [type(block.downsample).__name__ for block in blocks]

    assert kinds("A") == 3 * ["NoneType"] + 2 * ["ZeroPadShortcut", "NoneType", "NoneType"]
    assert kinds("B") == 3 * ["NoneType"] + 2 * ["Sequential", "NoneType", "NoneType"]
    assert kinds("C") == 9 * ["Sequential"]


def test_resnet_takes_every_shortcut_option():
    with torch.device("meta"):
        assert isinstance(models.resnet18(shortcut="A").layer2[0].downsample, ZeroPadShortcut)
        assert models.resnet18().layer1[0].downsample is None
        assert models.resnet18(shortcut="C").layer1[0].downsample is not None


def test_stride_on_1x1_moves_the_stride_and_nothing_else():
    with torch.device("meta"):
        paper, torchvisions = models.resnet50(stride_on_1x1=True), models.resnet50()
    assert (paper.layer2[0].conv1.stride, paper.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert (torchvisions.layer2[0].conv1.stride, torchvisions.layer2[0].conv2.stride) == ((1, 1), (2, 2))
    assert parameters(paper) == parameters(torchvisions)


def test_plain_networks_are_chains_of_units_without_shortcuts():
    with torch.device("meta"):
        model = models.plain18()
    units = [type(unit) for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for unit in stage]
    assert units == 16 * [ConvBNReLU2d]
    assert [row.status for row in fastres.explain(models.cifar_plain20()).rows] == 19 * ["fused"]


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "size", "spatial"),
    [("cifar_resnet20", 28, 7), ("cifar_resnet20_bottleneck", 28, 7), ("cifar_plain20", 32, 8), ("resnet18", 64, 2)],
)
def test_a_step_of_training(name, size, spatial, in_channels):
    torch.manual_seed(0)
    model = models.create(name, in_channels=in_channels, num_classes=7)
    shapes = []
    model.avgpool.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[2:])))
    logits = model(torch.randn(4, in_channels, size, size))
    assert logits.shape == (4, 7)
    assert shapes == [(spatial, spatial)]
    before = nn.functional.cross_entropy(logits, torch.arange(4))
    before.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet20_bottleneck", "cifar_plain20"])
def test_every_unit_is_fused_or_says_why(name):
    rows = fastres.explain(models.create(name)).rows
    for row in rows:
        why = "shortcut runs as its own module" if row.unit == "stage" else "ZeroPadShortcut"
        assert row.status == "fused" or (row.status == "partly" and why in row.reason)
    assert any(row.status == "fused" for row in rows)


def test_reverted_models_compute_the_same():
    torch.manual_seed(0)
    model = models.cifar_resnet20_bottleneck(in_channels=1, width=8).double()
    x = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    fused = model(x)
    torch.testing.assert_close(fastres.revert(model)(x), fused, rtol=1e-10, atol=1e-10)
    assert {row.status for row in fastres.explain(model).rows} == {"stock"}
    torch.testing.assert_close(fastres.convert(model)(x), fused, rtol=1e-10, atol=1e-10)


def test_initial_weights():
    torch.manual_seed(0)
    model = models.resnet50()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1e5:
            fan_out = module.out_channels * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_zero_init_residual_starts_each_block_as_its_shortcut():
    for name, block_class, norm in (("cifar_resnet20", BasicBlock, "bn2"), ("resnet50", Bottleneck, "bn3")):
        model = models.create(name, zero_init_residual=True)
        blocks = [module for module in model.modules() if isinstance(module, block_class)]
        assert blocks
        assert not any(block.get_submodule(norm).weight.any() for block in blocks)
        assert all(block.bn1.weight.all() for block in blocks)
    block = models.cifar_resnet20(zero_init_residual=True).layer1[0]
    x = torch.rand(2, 16, 5, 5)
    assert torch.equal(block(x), x)


def test_create_and_the_functions_agree():
    assert set(models.names()) <= set(models.__all__)
    with torch.device("meta"):
        for name in models.names():
            assert list(models.create(name).state_dict()) == list(getattr(models, name)().state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.create("resnet51"), "model 'resnet51' is not known; did you mean resnet50"),
        (lambda: models.create("vgg"), "model 'vgg' is not known; did you mean resnet18, "),
        (lambda: models.resnet18(shortcut="D"), "shortcut='D' is not known; use 'A'"),
        (lambda: models.resnet18(stride_on_1x1=True), "options of block='bottleneck', not of 'basic'"),
        (lambda: models.plain18(shortcut="A"), "a plain network has no shortcuts"),
        (lambda: models.cifar_plain20(shortcut="A"), "a plain network has no shortcuts"),
        (lambda: models.cifar_plain20(zero_init_residual=True), "a plain network has no residual blocks"),
        (lambda: models.ResNet("basic", (2, 2, 2)), "four numbers of blocks, one for each stage, has 3"),
        (lambda: models.ResNet("inception", (2, 2, 2, 2)), "block='inception' is not known; use one of 'basic'"),
        (lambda: models.CifarResNet(0), "blocks_per_stage must be at least 1, is 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_image_shapes_are_what_the_models_take():
    for name in ("resnet18", "cifar_resnet20", "plain18"):
        assert models.create(name)(torch.zeros(2, *models.image_shape(name))).shape[0] == 2
    assert models.image_shape("cifar_resnet20") == (3, 32, 32)
