"""What a unit's operators ask of a device: memory formats, copies, casts, and nothing of the host.

The plan of a GPU is watched on the meta device, where a read of a value raises; both forms are watched on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

import fastres
from fastres import models, plan
from fastres.cost.model import on_meta
from fastres.cost.traffic import Operators, tensors
from fastres.functional import _library
from fastres.kernels import reference
from fastres.models.stages import make_stage
from fastres.nn import make_shortcut
from fastres.numerics import assert_three_way, relative_error

aten = torch.ops.aten


class Watch(Operators):
    """Every operator that runs: `calls` of (operator, arguments, result). Inside our operators: `inside`."""

    def __init__(self):
        super().__init__()
        self.calls, self.inside, self._depth = [], [], 0
        self.expand = self._body

    def _body(self, func):
        body = _library.BODIES.get(func)

        def run(*args):
            self._depth += 1
            try:
                return body(*args)
            finally:
                self._depth -= 1

        return run if body else None

    def ran(self, func, args, kwargs, result):
        call = func.overloadpacket, args, result
        self.calls.append(call)
        if self._depth:
            self.inside.append(call)


def without_our_kernels(k):
    """Triton's kernels stand in by shape only: what they are made of is not PyTorch's operators."""

    def unwatched(name):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return getattr(reference, name)(*args, **kwargs)

        return call

    changed = {
        name: unwatched(name) if plan.origin(launcher) == "triton" else plan.with_passes(launcher, without_our_kernels)
        for name, launcher in plan.launchers(k).items()
    }
    return type(k)(**vars(k) | changed)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def step_on_a_gpu(request):
    """A training step of ResNet-50 by the plan of a GPU, on the meta device."""
    pytest.importorskip("triton")
    model = fastres.convert(on_meta(models.resnet50(), request.param))
    x = torch.empty(2, 3, 64, 64, dtype=request.param, device="meta").to(memory_format=torch.channels_last)
    with plan.wrapping(without_our_kernels), Watch() as watch:
        model(x).sum().backward()
    return request.param, watch


def test_convolutions_take_and_give_channels_last(step_on_a_gpu):
    dtype, watch = step_on_a_gpu
    seen = 0
    for operator, args, result in watch.inside:
        if operator is aten.convolution:
            operands = [*args[:2], result]
        elif operator is aten.convolution_backward:
            (dy, x, weight), (need_x, need_weight, _) = args[:3], args[10]
            operands = [dy, *tensors(result), *([weight] if need_x else []), *([x] if need_weight else [])]
        else:
            continue
        seen += 1
        for t in operands:
            assert t.is_contiguous(memory_format=torch.channels_last), (operator, t.shape, t.stride())
    # Each with fprop, dgrad (not of the stem) and wgrad. In 16 bits Triton takes all of these small ones but the 7x7.
    assert seen == 3 * (53 if dtype == torch.float32 else 1) - 1


def test_no_activation_is_copied_inside_the_units(step_on_a_gpu):
    dtype, watch = step_on_a_gpu
    smallest = 2 * 2 * 2 * 512  # layer4's, [N, H, W, C]
    copies = [
        (operator, result.shape)
        for operator, args, result in watch.inside
        if operator in (aten.clone, aten.copy_, aten._to_copy) and is_activation(args, smallest)
    ]
    assert copies == []


def is_activation(args, smallest):
    source = tensors(args)[-1]
    return source.dim() == 4 and source.numel() >= smallest and source.shape[0] == 2


def twins(name):
    """The converted model and its stock copy."""
    torch.manual_seed(0)
    model = models.create(name).to(memory_format=torch.channels_last)
    return fastres.convert(model), fastres.revert(copy.deepcopy(model))


FORMS = {
    "folded": {"gram_folding": True},
    "folded, as on a GPU": {"gram_folding": True, "fold_projection": False},
    "stored": {"gram_folding": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_cast_once_per_step(form):
    model, _ = twins("cifar_resnet11_bottleneck")
    weights = {m.weight.data_ptr(): 0 for m in model.modules() if isinstance(m, nn.Conv2d)}
    with plan.wrapping(lambda k: plan.in_form(k, **FORMS[form])), Watch() as watch:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(4, 3, 32, 32)).float().sum()
        loss.backward()
    for operator, args, _ in watch.calls:
        if operator is aten._to_copy and args[0].data_ptr() in weights:
            weights[args[0].data_ptr()] += 1
    assert set(weights.values()) == {1}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["cifar_resnet11_bottleneck", "cifar_resnet20"])
def test_the_host_reads_no_value(name, form, momentum):
    """A read would wait for the device in every block, and could not be captured in a CUDA graph."""
    model, _ = twins(name)
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.momentum = momentum
    with plan.wrapping(lambda k: plan.in_form(k, **FORMS[form])), Watch() as watch:
        model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert watch.inside
    assert not [call for call in watch.calls if call[0] is aten._local_scalar_dense]


def scaled_step(model, x, form):
    """Gradients after `unscale_`, whether the optimizer stepped, and the scale after the step, in float16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with plan.wrapping(lambda k: plan.in_form(k, **FORMS[form])), torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x).float(), torch.arange(len(x)))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True)]
    return grads, moved, scaler.get_scale()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_under_a_grad_scaler_are_within_twice_the_error_of_stocks(form):
    model, stock = twins("cifar_resnet11_bottleneck")
    x = torch.randn(8, 3, 32, 32)
    exact = copy.deepcopy(stock).double()
    F.cross_entropy(exact(x.double()), torch.arange(8)).backward()
    ours, moved, scale = scaled_step(model, x, form)
    theirs, _, _ = scaled_step(stock, x, form)
    assert all(moved) and scale == 2.0**10
    for name, parameter in exact.named_parameters():
        assert_three_way(name, ours[name], theirs[name], parameter.grad, torch.float16)


@pytest.mark.parametrize("form", FORMS)
def test_a_grad_scaler_skips_a_step_that_is_not_finite_as_with_stock(form):
    for model in twins("cifar_resnet11_bottleneck"):
        x = torch.randn(8, 3, 32, 32)
        x[0, 0, 5, 5] = math.inf
        _, moved, scale = scaled_step(model, x, form)
        assert not any(moved) and scale == 2.0**9


GPU_FORMS = {
    "projection stored, one pass": {"fold_projection": False, "one_pass": True},
    "projection folded, two kernels": {"fold_projection": True, "one_pass": False},
}


def assert_exact(fused, x, **flags):
    """The output, every gradient that is wanted and the state are stock's in float64, in the block's own form."""
    found = []
    for model in (fused, fastres.revert(copy.deepcopy(fused))):
        own = x.clone().requires_grad_()
        wanted = [own, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        with plan.wrapping(lambda k: plan.in_form(k, gram_folding=True, **flags)):
            out = model(own)
            grads = torch.autograd.grad(out.square().sum(), wanted)
        found.append((out, *grads, *model.state_dict().values()))
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours.double(), exact.double()) < 1e-10


@pytest.mark.parametrize("form", GPU_FORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride, channels", [(1, 24), (2, 24), (1, 64)])
def test_forms_of_a_gpu_are_exact_in_float64(stride, channels, training, form):
    torch.manual_seed(0)
    projects = (stride, channels) != (1, 64)
    shortcut = make_shortcut("B", channels, 64, stride) if projects else None
    fused = fastres.nn.Bottleneck(channels, 16, stride, shortcut).double().train(training)
    assert_exact(fused, torch.randn(4, channels, 9, 8).double(), **GPU_FORMS[form])


@pytest.mark.parametrize("form", GPU_FORMS)
@pytest.mark.parametrize("block", ["bottleneck", "basic"])
def test_a_stage_in_forms_of_a_gpu_is_exact_in_float64(block, form):
    torch.manual_seed(0)
    fused = make_stage(block, 24, 16, 3, 2)[0].double()
    assert_exact(fused, torch.randn(4, 24, 9, 8).double(), **GPU_FORMS[form])


@pytest.mark.parametrize("fold_projection", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "projection", "all but the projection"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride, channels", [(1, 24), (2, 24), (1, 16)])
def test_a_basic_block_of_a_gpu_is_exact_in_float64(stride, channels, training, frozen, fold_projection):
    torch.manual_seed(0)
    projects = (stride, channels) != (1, 16)
    shortcut = make_shortcut("B", channels, 16, stride) if projects else None
    fused = fastres.nn.BasicBlock(channels, 16, stride, shortcut).double().train(training)
    for name, parameter in fused.named_parameters():
        of_projection = name.startswith("downsample")
        parameter.requires_grad_(frozen == "nothing" or of_projection == (frozen != "projection"))
    assert_exact(fused, torch.randn(4, channels, 9, 8).double(), fold_projection=fold_projection)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_stage_by_tritons_kernels_equals_its_blocks(one_pass):
    """Bit for bit, in float16 through the interpreter; the gradient that a kernel was given stays what it was."""
    pytest.importorskip("triton")
    from fastres.kernels import triton

    torch.manual_seed(0)
    chained = make_stage("bottleneck", 24, 8, 3, 2)[0].half().to(memory_format=torch.channels_last)
    for bn in (module for module in chained.modules() if isinstance(module, nn.BatchNorm2d)):
        bn.float()
    apart = copy.deepcopy(chained)
    apart.granularity = "block"
    x = torch.randn(4, 24, 9, 8).half().to(memory_format=torch.channels_last)
    ours = {name: getattr(triton, name) for name in triton.__all__} | {"fold_projection": False, "one_pass": one_pass}
    found = []
    for model in (chained, apart):
        own = x.clone().requires_grad_()
        with plan.wrapping(lambda k: type(k)(**vars(k) | ours)):
            out = model(own)
            g = torch.ones_like(out)
            found.append((out, *torch.autograd.grad(out, [own, *model.parameters()], g)))
        assert g.eq(1).all()
    for together, separate in zip(*found, strict=True):
        assert torch.equal(together, separate)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "block, stride, channels",
    [("Bottleneck", 2, 24), ("Bottleneck", 1, 64), ("BasicBlock", 2, 24), ("BasicBlock", 1, 16)],
)
def test_a_block_by_tritons_kernels(block, stride, channels, training):
    """The whole unit in float16 through the interpreter: what one kernel gives the next takes."""
    pytest.importorskip("triton")
    from fastres.kernels import triton

    ours = {name: getattr(triton, name) for name in triton.__all__}
    flags = {"gram_folding": True, "fold_projection": False}
    found = [{}, {}, {}]
    # Of several seeds together: a ReLU's mask that rounding flips outweighs all arithmetic of one.
    for seed in range(4):
        torch.manual_seed(seed)
        outputs = 16 * getattr(fastres.nn, block).expansion
        shortcut = make_shortcut("B", channels, outputs, stride) if stride != 1 else None
        fused = getattr(fastres.nn, block)(channels, 16, stride, shortcut).half()
        fused.to(memory_format=torch.channels_last).train(training)
        for bn in (module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)):
            bn.float()
        stock = fastres.revert(copy.deepcopy(fused))
        x = torch.randn(4, channels, 9, 8).half().to(memory_format=torch.channels_last)
        g = torch.randn(4, outputs, (9 + stride - 1) // stride, 8 // stride).half()
        for results, model in zip(found, (fused, stock, copy.deepcopy(stock).double()), strict=True):
            own = x.to(model.conv1.weight.dtype).requires_grad_()
            wrap = plan.wrapping(lambda k: type(k)(**vars(k) | ours | flags))
            with wrap if model is fused else contextlib.nullcontext():
                out = model(own)
                grads = torch.autograd.grad(out, [own, *model.parameters()], g.to(out.dtype))
            names = "out", "x", *(name for name, _ in model.named_parameters())
            for name, value in zip(names, (out, *grads), strict=True):
                results.setdefault(name, []).append(value)
    for name in found[2]:
        assert_three_way(name, *(torch.stack(results[name]) for results in found), torch.float16)
