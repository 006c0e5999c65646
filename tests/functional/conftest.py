"""One small network per fused unit, able to run its stock composition and the fused function on the same parameters."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres import functional as fused
from fastres import plan
from fastres.functional import BatchNormParams


def params(bn: nn.BatchNorm2d) -> BatchNormParams:
    """What torch.nn.BatchNorm2d.forward hands to F.batch_norm, as the fused units take it."""
    update = bn.training and bn.track_running_stats
    batch_stats = bn.training or bn.running_mean is None
    keep = update or not batch_stats
    return BatchNormParams(
        bn.weight,
        bn.bias,
        bn.running_mean if keep else None,
        bn.running_var if keep else None,
        bn.num_batches_tracked if update else None,
        batch_stats,
        bn.momentum,
        bn.eps,
    )


class Unit(nn.Module):
    """Convolutions and their batch norms in order; `stock` and `fused` compute the same from them."""

    def __init__(self, convs: list[nn.Conv2d], **bn_options):
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.bns = nn.ModuleList(nn.BatchNorm2d(conv.out_channels, **bn_options) for conv in convs)
        for bn in self.bns:
            if bn.affine:
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                nn.init.normal_(bn.bias)
            if bn.track_running_stats:
                nn.init.normal_(bn.running_mean)
                nn.init.uniform_(bn.running_var, 0.5, 2.0)

    def weights_and_bns(self, count: int) -> list:
        pairs = zip(self.convs[:count], self.bns[:count], strict=True)
        return [item for conv, bn in pairs for item in (conv.weight, params(bn))]


class Bottleneck(Unit):
    size = (2, 7, 7)

    def __init__(
        self, stride=1, projection=False, stride_on_1x1=False, groups=1, dilation=1, cin=16, scale=1, **bn_options
    ):
        cin, width, cout = cin * scale, 4 * scale, 16 * scale
        first, second = (stride, 1) if stride_on_1x1 else (1, stride)
        convs = [
            nn.Conv2d(cin, width, 1, first, bias=False),
            nn.Conv2d(width, width, 3, second, dilation, dilation, groups, bias=False),
            nn.Conv2d(width, cout, 1, bias=False),
        ]
        if projection:
            convs.append(nn.Conv2d(cin, cout, 1, stride, bias=False))
        super().__init__(convs, **bn_options)
        self.options = {"stride": stride, "stride_on_1x1": stride_on_1x1, "groups": groups, "dilation": dilation}

    def stock(self, x, shortcut=None):
        z = F.relu(self.bns[0](self.convs[0](x)))
        z = F.relu(self.bns[1](self.convs[1](z)))
        z = self.bns[2](self.convs[2](z))
        if len(self.convs) == 4:
            shortcut = self.bns[3](self.convs[3](x))
        z += x if shortcut is None else shortcut  # in place, as torchvision: under autocast the sum stays bfloat16
        return F.relu(z)

    def params(self):
        projection = (self.convs[3].weight, params(self.bns[3])) if len(self.convs) == 4 else None
        return fused.BottleneckParams(*self.weights_and_bns(3), projection=projection, **self.options)

    def fused(self, x, shortcut=None, backend="auto"):
        return fused.bottleneck(x, **self.params()._asdict(), shortcut=shortcut, backend=backend)


class BasicBlock(Unit):
    size = (2, 7, 7)

    def __init__(self, stride=1, projection=False, cin=6, scale=1, **bn_options):
        cin, width = cin * scale, 6 * scale
        convs = [nn.Conv2d(cin, width, 3, stride, 1, bias=False), nn.Conv2d(width, width, 3, 1, 1, bias=False)]
        if projection:
            convs.append(nn.Conv2d(cin, width, 1, stride, bias=False))
        super().__init__(convs, **bn_options)
        self.stride = stride

    def stock(self, x, shortcut=None):
        z = F.relu(self.bns[0](self.convs[0](x)))
        z = self.bns[1](self.convs[1](z))
        if len(self.convs) == 3:
            shortcut = self.bns[2](self.convs[2](x))
        z += x if shortcut is None else shortcut  # in place, as torchvision: under autocast the sum stays bfloat16
        return F.relu(z)

    def params(self):
        projection = (self.convs[2].weight, params(self.bns[2])) if len(self.convs) == 3 else None
        return fused.BasicBlockParams(*self.weights_and_bns(2), projection=projection, stride=self.stride)

    def fused(self, x, shortcut=None, backend="auto"):
        return fused.basic_block(x, **self.params()._asdict(), shortcut=shortcut, backend=backend)


class Stage(nn.Module):
    """Blocks one behind the other. kinds: a class and its options for each."""

    size = (2, 7, 7)

    def __init__(self, kinds, **options):
        super().__init__()
        self.blocks = nn.ModuleList(cls(**own, **options) for cls, own in kinds)

    @property
    def convs(self):
        return [conv for block in self.blocks for conv in block.convs]

    @property
    def bns(self):
        return [bn for block in self.blocks for bn in block.bns]

    def stock(self, x):
        for block in self.blocks:
            x = block.stock(x)
        return x

    def one_by_one(self, x):
        for block in self.blocks:
            x = block.fused(x)
        return x

    def fused(self, x, backend="auto"):
        return fused.stage(x, [block.params() for block in self.blocks], backend=backend)


class ConvBNReLU(Unit):
    size = (2, 7, 5)

    def __init__(
        self, kernel=3, stride=1, padding=1, dilation=1, groups=1, bias=False, relu=True, scale=1, **bn_options
    ):
        conv = nn.Conv2d(6 * scale, 4 * scale, kernel, stride, padding, dilation, groups, bias)
        super().__init__([conv], **bn_options)
        self.relu = relu

    def stock(self, x):
        z = self.bns[0](self.convs[0](x))
        return F.relu(z) if self.relu else z

    def fused(self, x, backend="auto"):
        conv = self.convs[0]
        options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        options |= {"conv_bias": conv.bias, "relu": self.relu, "backend": backend}
        return fused.conv_bn_relu(x, *self.weights_and_bns(1), **options)


class Stem(Unit):
    size = (2, 15, 14)

    def __init__(self, scale=1, **bn_options):
        super().__init__([nn.Conv2d(3, 5 * scale, 7, 2, 3, bias=False)], **bn_options)

    def stock(self, x):
        return F.max_pool2d(F.relu(self.bns[0](self.convs[0](x))), 3, 2, 1)

    def fused(self, x, backend="auto"):
        return fused.stem(x, *self.weights_and_bns(1), backend=backend)


class Projection(Unit):
    size = (3, 7, 8)

    def __init__(self, stride=2, scale=1, **bn_options):
        super().__init__([nn.Conv2d(5 * scale, 7 * scale, 1, stride, bias=False)], **bn_options)
        self.stride = stride

    def stock(self, x):
        return self.bns[0](self.convs[0](x))

    def fused(self, x, backend="auto"):
        return fused.projection(x, *self.weights_and_bns(1), stride=self.stride, backend=backend)


NARROWING = {"projection": True, "stride": 2}
STAGES = {
    "stage-bottleneck": [(Bottleneck, NARROWING | {"cin": 6}), (Bottleneck, {}), (Bottleneck, {})],
    "stage-basic": [(BasicBlock, NARROWING | {"cin": 5}), (BasicBlock, {}), (BasicBlock, {})],
    # Every kind of boundary: an identity or a projection behind each of them, and another kind of block.
    "stage-mixed": [
        (Bottleneck, {}),
        (Bottleneck, NARROWING),
        (Bottleneck, {"projection": True}),
        (BasicBlock, {"projection": True, "cin": 16}),
        (BasicBlock, {}),
    ],
}

UNITS = {
    "bottleneck": (Bottleneck, {}),
    "bottleneck-projection": (Bottleneck, {"projection": True, "cin": 6}),
    "bottleneck-projection-stride2": (Bottleneck, {"projection": True, "stride": 2, "cin": 6}),
    "bottleneck-stride-on-1x1": (Bottleneck, {"projection": True, "stride": 2, "stride_on_1x1": True}),
    "bottleneck-grouped": (Bottleneck, {"groups": 2}),
    "bottleneck-dilated": (Bottleneck, {"dilation": 2, "projection": True}),
    "basic": (BasicBlock, {}),
    "basic-projection": (BasicBlock, {"projection": True, "cin": 5}),
    "basic-projection-stride2": (BasicBlock, {"projection": True, "stride": 2, "cin": 5}),
    "conv3x3-bn-relu": (ConvBNReLU, {}),
    "conv3x3-bn": (ConvBNReLU, {"relu": False, "stride": 2}),
    "conv3x3-bn-relu-bias": (ConvBNReLU, {"bias": True}),
    "conv1x1-bn-relu": (ConvBNReLU, {"kernel": 1, "padding": 0, "stride": 2}),
    "conv1x1-bn-bias": (ConvBNReLU, {"kernel": 1, "padding": 0, "bias": True, "relu": False}),
    "conv5x3-grouped": (ConvBNReLU, {"kernel": (5, 3), "padding": (2, 1), "groups": 2}),
    "conv3x3-dilated": (ConvBNReLU, {"padding": (2, 1), "dilation": (2, 1)}),
    "stem": (Stem, {}),
    "projection": (Projection, {}),
    "projection-stride1": (Projection, {"stride": 1}),
    **{name: (Stage, {"kinds": kinds}) for name, kinds in STAGES.items()},
}


BOTH_FORMS = [name for name, (cls, _) in UNITS.items() if cls in (Bottleneck, BasicBlock, Projection, Stage)]


def in_both_forms(names) -> list[str]:
    return [*names, *(f"{name}, stored" for name in names if name in BOTH_FORMS)]


def in_form(param: str):
    """The name without the form; inside, plans have that form."""
    name, _, stored = param.partition(", ")
    with plan.wrapping(lambda k: plan.in_form(k, gram_folding=False)) if stored else contextlib.nullcontext():
        yield name


@pytest.fixture(params=in_both_forms(UNITS))
def unit_name(request) -> str:
    """Of every unit, in every form; the forms on a CPU are Gram-folded unless a plan is told otherwise."""
    yield from in_form(request.param)


@pytest.fixture(params=in_both_forms([name for name in UNITS if name not in STAGES]))
def single_unit_name(request) -> str:
    """As `unit_name` without stages, whose numbers are those of their blocks bit for bit (`test_stage.py`)."""
    yield from in_form(request.param)


@pytest.fixture
def make_unit():
    """Build a unit of `UNITS` by name, its channels multiplied by `scale`, and a channels_last input for it."""

    def make(name: str, dtype=torch.float64, seed=0, size=None, **options):
        torch.manual_seed(seed)
        cls, own_options = UNITS[name]
        unit = cls(**own_options, **options).to(dtype)
        n, h, w = size or cls.size
        x = torch.randn(n, unit.convs[0].in_channels, h, w, dtype=torch.float64)
        return unit, x.to(dtype, memory_format=torch.channels_last)

    return make


@pytest.fixture
def run_both():
    """Run stock and fused on copies of a unit; return for each the output, gradients by name and state_dict."""

    def run(unit, x, shortcut=None, x_grad=True, backend="auto"):
        results = []
        g = None
        for method in ("stock", "fused"):
            own = copy.deepcopy(unit)
            inputs = [x.clone().requires_grad_(x_grad)]
            if shortcut is not None:
                inputs.append(shortcut.clone().requires_grad_())
            kw = {"backend": backend} if method == "fused" else {}
            out = getattr(own, method)(*inputs, **kw)
            leaves = {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
            leaves |= {name: p for name, p in own.named_parameters() if p.requires_grad}
            if g is None:
                g = torch.randn(out.shape, dtype=torch.float64).to(out.dtype, memory_format=torch.channels_last)
            grads = {}
            if leaves:
                found = torch.autograd.grad(out, list(leaves.values()), g, allow_unused=True)
                grads = dict(zip(leaves, found, strict=True))
            results.append((out.detach(), grads, own.state_dict()))
        return results

    return run
