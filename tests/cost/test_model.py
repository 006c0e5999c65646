"""A whole training step: what is counted, under which label, and what the three schemes come to."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastres
from fastres import cost, models
from fastres.cost.traffic import Traffic
from fastres.parts import PARTS


@pytest.fixture(scope="module")
def resnet50():
    return models.resnet50()


@pytest.fixture(scope="module")
def steps(resnet50):
    return {scheme: cost.training_step(resnet50, (256, 3, 224, 224), scheme=scheme) for scheme in cost.SCHEMES}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "plain18", "cifar_resnet20"])
def test_counted_and_modelled_bytes_of_stock_agree_within_5_percent(name):
    model, shape = models.create(name), (32, *models.image_shape(name))
    counted = cost.total(cost.training_step(model, shape, scheme="stock")).bytes
    assert cost.modelled_stock_bytes(model, shape) == pytest.approx(counted, rel=0.05)


def test_the_plan_of_today_moves_at_most_0_44_of_stock(steps):
    assert cost.total(steps["today"]).bytes <= 0.44 * cost.total(steps["stock"]).bytes


def test_the_complete_plan_moves_at_most_0_42_of_stock(steps):
    assert cost.total(steps["complete"]).bytes <= 0.42 * cost.total(steps["stock"]).bytes


def test_stock_flops_are_those_of_the_paper(steps):
    """3.8e9 multiply-adds; 4.09e9 in torchvision's variant with the stride on the 3x3 conv."""
    flops = cost.total(steps["stock"]).flops / 256
    stem_dgrad = 2 * 112 * 112 * 64 * 3 * 49  # nobody needs the images' gradient
    assert flops == pytest.approx(3 * 2 * 4.09e9 - stem_dgrad, rel=0.002)


def test_gram_folding_costs_a_few_percent_of_the_flops(steps):
    stock, today, complete = (cost.total(steps[scheme]).flops for scheme in cost.SCHEMES)
    # The complete plan folds every projection.
    assert stock < today < complete < 1.1 * stock


@pytest.mark.parametrize("scheme", cost.SCHEMES)
def test_every_step_stands_under_its_block(steps, scheme):
    names = [f"layer{i + 1}.{j}" for i, count in enumerate((3, 4, 6, 3)) for j in range(count)]
    for direction in ("forward", "backward"):
        units = [step.unit for step in steps[scheme] if step.direction == direction]
        expected = ["stem", *names, "head"]
        assert list(dict.fromkeys(units)) == (expected if direction == "forward" else expected[::-1])
    forward = [step for step in steps[scheme] if step.unit == "layer3.1" and step.direction == "forward"]
    convs = {
        "stock": ["convolution"] * 3,
        "today": ["conv1x1", "conv3x3", "expand"],
        "complete": ["conv1x1", "conv3x3", "expand"],
    }
    assert [step.kernel for step in forward if step.kernel in convs[scheme]] == convs[scheme]


def test_a_step_holds_the_floor_of_its_part(resnet50):
    fast, slow = (
        cost.total(cost.training_step(resnet50, (2, 3, 64, 64), scheme="complete", part=PARTS[part])).seconds
        for part in ("h200", "a100")
    )
    assert 4.8 / 2.039 < slow / fast < 989.5 / 312


def test_the_dtype_halves_the_bytes_of_activations(resnet50):
    half, single = (
        cost.total(cost.training_step(resnet50, (64, 3, 224, 224), dtype, scheme="stock")).bytes
        for dtype in (torch.float16, torch.float32)
    )
    assert 1.95 < single / half <= 2


@pytest.mark.parametrize("convert", [False, True])
def test_the_model_does_not_change(convert):
    model = models.create("cifar_resnet11_bottleneck")
    model = fastres.convert(model) if convert else fastres.revert(model)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    counted = [cost.total(cost.training_step(model, (4, 3, 32, 32), scheme=scheme)) for scheme in cost.SCHEMES]
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(set(counted)) == 3


def test_a_single_block_and_a_frozen_one():
    block = fastres.nn.Bottleneck(256, 64)
    steps = cost.training_step(block, (8, 256, 14, 14))
    assert any(step.kernel == "conv3x3_wgrad" for step in steps)
    block.conv2.weight.requires_grad_(False)
    frozen = cost.training_step(block, (8, 256, 14, 14))
    assert not any(step.kernel == "conv3x3_wgrad" for step in frozen)


def test_blocks_that_cannot_be_fused_count_as_stock():
    model = models.create("cifar_resnet11_bottleneck")
    model.layer2[0].bn2 = nn.GroupNorm(1, 32)
    steps = cost.training_step(model, (4, 3, 32, 32), scheme="today")
    backends = {unit: {step.backend for step in steps if step.unit == unit} for unit in ("layer2.0", "layer1.0")}
    assert backends["layer2.0"] == {"aten"} and "triton" in backends["layer1.0"]


def test_wrong_arguments():
    model = models.create("cifar_resnet20")
    with pytest.raises(ValueError, match="scheme='best' is not known; use one of 'stock', 'today', 'complete'"):
        cost.training_step(model, (1, 3, 32, 32), scheme="best")
    with pytest.raises(ValueError, match="float64 has no figures on H200 SXM; use bfloat16, float16, float32"):
        cost.training_step(model, (1, 3, 32, 32), torch.float64)


def test_a_comparison_prints_every_block_and_the_totals(resnet50):
    comparison = cost.compare(resnet50, (32, 3, 224, 224), part=PARTS["a100"])
    text = str(comparison)
    assert "Floors on one A100 SXM 80 GB: 2.039 TB/s, 312 TFLOP/s (NVIDIA A100 Tensor Core GPU datasheet" in text
    assert "layer3.1 to layer3.4" in text
    (line,) = [line for line in text.splitlines() if line.startswith("  forward") and "projection_conv" in line]
    assert "projection  " in line, "the widest projection is stored"
    assert re.search(r"forward +expand +triton .* modelled \d+, library \d+", text)
    for name, scheme in (("stock eager, counted", "stock"), ("the complete plan, modelled", "complete")):
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        counted = cost.total(comparison.steps[scheme]).bytes / 32 / 1e6
        assert float(line.removeprefix(name).split()[0]) == pytest.approx(counted, abs=0.05)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("scheme", ["today", "complete"])
def test_inside_a_stage_the_mask_is_in_the_gradient(steps, scheme):
    """Only the last block of a stage reads its output for the mask, and writes the masked gradient."""
    moved = {step.unit: step.bytes for step in steps[scheme] if step.kernel == "expand_wgrad" and "layer3" in step.unit}
    block = 256 * 14 * 14 * 1024 * 2
    assert moved["layer3.1"] == moved["layer3.4"] == moved["layer3.5"] - 2 * block


def test_a_block_that_runs_by_itself_inside_a_stage_keeps_its_steps():
    model = models.create("cifar_resnet20_bottleneck")
    chained = cost.training_step(model, (4, 3, 32, 32))
    model.layer2[1].register_forward_hook(lambda *_: None)
    apart = cost.training_step(model, (4, 3, 32, 32))
    places = [[(step.unit, step.direction, step.kernel) for step in steps] for steps in (chained, apart)]
    assert set(places[0]) <= set(places[1])
    assert [place for place in places[0] if "layer2" not in place[0]] == [
        place for place in places[1] if "layer2" not in place[0]
    ]


def test_a_real_step_moves_what_the_meta_device_says():
    model, shape = fastres.revert(models.create("cifar_resnet20")), (4, 3, 32, 32)
    on_meta = cost.training_step(model, shape, torch.float32, scheme="stock")
    images = torch.randn(shape).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    with Traffic(PARTS["h200"]) as traffic:
        F.cross_entropy(model(images), torch.zeros(4, dtype=torch.int64)).backward()
    counted, expected = ({step.kernel: 0 for step in steps} for steps in (traffic.steps, on_meta))
    for sums, steps in ((counted, traffic.steps), (expected, on_meta)):
        for step in steps:
            sums[step.kernel] += step.bytes
    for kernel in ("convolution", "convolution_backward", "native_batch_norm_backward", "threshold_backward", "relu_"):
        assert counted[kernel] == expected[kernel], kernel
    assert cost.total(traffic.steps).flops == cost.total(on_meta).flops
    assert cost.total(traffic.steps).bytes == pytest.approx(cost.total(on_meta).bytes, rel=0.01)
