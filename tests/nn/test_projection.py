"""`Projection` on a GPU, folded by the extension's CUDA kernels whatever the plan would say of so small a one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import fastres
from fastres import backends, plan
from fastres.nn import Projection
from fastres.numerics import assert_three_way

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

KERNELS = ["projection_gram", "projection_fprop", "projection_wgrad", "projection_dgrad"]
BY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["projection", "projection.hopper"], autouse=True)
def launched(request, monkeypatch):
    """The kernels that ran, by name."""
    extension = backends.load(request.param)
    reason = extension.cuda_available() if request.param == "projection" else extension.available()
    if reason is not None:
        pytest.skip(reason)
    names = []

    def noting(name):
        def launch(*args, **kwargs):
            names.append(name)
            return getattr(extension, name)(*args, **kwargs)

        return launch

    monkeypatch.setattr(plan, "seconds_saved_by_folding", lambda *shape: 1.0)
    own = {name: noting(name) for name in KERNELS}
    with plan.wrapping(lambda k: SimpleNamespace(**vars(k) | own) if k.gram_folding else k):
        yield names


def make():
    torch.manual_seed(0)
    module = Projection(72, 136, 2).cuda()
    torch.nn.init.uniform_(module[1].weight, 0.5, 1.5)
    x = torch.randn(16, 72, 27, 29, device="cuda").relu_().to(memory_format=torch.channels_last)
    return module, x, torch.randn(16, 136, 14, 15, device="cuda").to(memory_format=torch.channels_last)


def run(module, x, g, dtype):
    """Output, gradients and buffers by name; float64 modules run in float64."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        out = module(x)
    module = getattr(module, "_orig_mod", module)  # of a compiled one
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [x, *parameters], g.to(out.dtype))
    return {"output": out.detach()} | dict(zip(["x", *names], gradients, strict=True)) | dict(module.named_buffers())


@BY_DTYPE
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
def test_errors_are_within_twice_stocks(launched, dtype, memory_format):
    module, x, g = make()
    x = x.to(dtype).contiguous(memory_format=memory_format)
    g = g.to(dtype).contiguous(memory_format=memory_format)
    stock = fastres.revert(copy.deepcopy(module))
    exact = copy.deepcopy(stock).double()
    with torch.no_grad():
        exact[0].weight.copy_(exact[0].weight.to(dtype))  # as both read it
    exactly = run(exact, x.double(), g.double(), None)
    ours, theirs = run(module, x, g, dtype), run(stock, x, g, dtype)
    assert launched == KERNELS
    for name, value in exactly.items():
        if value.is_floating_point():
            assert_three_way(name, ours[name], theirs[name], value, dtype)


@BY_DTYPE
def test_replays_of_a_cuda_graph_have_the_same_bits(launched, dtype):
    module, x, g = make()
    twin = copy.deepcopy(module)
    static = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(module, static, g, dtype)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(module, static, g, dtype)
    static.copy_(x)
    graph.replay()
    eager = run(twin, x, g, dtype)
    assert len(launched) == 4 * len(KERNELS)
    for name in ("output", "x", "0.weight", "1.weight", "1.bias"):
        assert eager[name].isfinite().all() and torch.equal(replayed[name], eager[name]), name


@BY_DTYPE
def test_compiled_it_has_the_same_bits(dtype):
    module, x, g = make()
    eager = run(copy.deepcopy(module), x, g, dtype)
    compiled = run(torch.compile(module, fullgraph=True), x, g, dtype)
    for name in ("output", "x", "0.weight", "1.weight", "1.bias"):
        assert torch.equal(compiled[name], eager[name]), name
