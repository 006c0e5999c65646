"""The projection extension against F.conv2d on the CPU: fprop alone, and forward + backward with accumulation into dx.

Shapes are those of ResNet-50's four projections at 224x224, batch 4. "library" runs the same steps by PyTorch's GEMMs.
"conv" is stock's convolution and its autograd; "conv + bn" adds the batch norm, which the first two include: their Gram
gives its statistics, and small matrices its backward.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastres.kernels import library, projection, reference

pytestmark = pytest.mark.skipif(projection.available() is not None, reason=str(projection.available()))

# channels in and out, height and width, stride
SHAPES = {
    "layer1": (64, 256, 56, 1),
    "layer2": (256, 512, 56, 2),
    "layer3": (512, 1024, 28, 2),
    "layer4": (1024, 2048, 14, 2),
}
BATCH = 4
KERNELS = {"extension": projection, "library": library}


class Case:
    def __init__(self, layer: str, dtype: torch.dtype):
        c, k, size, self.stride = SHAPES[layer]
        out = (size - 1) // self.stride + 1
        self.x = torch.randn(BATCH, size, size, c).to(dtype)
        self.g = torch.randn(BATCH, out, out, k).to(dtype)
        self.weight = (torch.randn(k, c) / c**0.5).to(dtype)
        self.dx = torch.randn(BATCH, size, size, c).to(dtype)
        self.gamma, self.beta = torch.ones(k), torch.zeros(k)
        self.bn = torch.randn(4, k)

    def fused(self, kernels) -> torch.Tensor:
        """Forward and backward; dx receives the input's gradient. Returns the weight's gradient."""
        x, g, count = self.x, self.g, self.g.shape[:3].numel()
        moments = kernels.projection_gram(x, self.stride)
        stats = (self.gamma, self.beta, None, None, None, 0.1, 1e-5)
        bn, mean, scatter = reference.gram_finalize(moments, count, self.weight, *stats)
        kernels.projection_fprop(x, self.weight, bn, self.stride)
        p = kernels.projection_wgrad(g, x, self.stride)
        sum_g = g.sum((0, 1, 2), dtype=torch.float32)
        dw, _, u, v, k = reference.gram_bwd(p, sum_g, self.weight, bn, count, mean, scatter)
        kernels.projection_dgrad(self.dx, g, x, u, v, k, self.stride)
        return dw

    def stock(self, with_bn: bool):
        """The same by autograd, as a callable: the input's gradient is accumulated into one that is there."""
        x = self.x.permute(0, 3, 1, 2).requires_grad_()
        x.grad = self.dx.permute(0, 3, 1, 2)
        weight = self.weight[:, :, None, None].to(memory_format=torch.channels_last).requires_grad_()
        gamma, beta, g = self.gamma.requires_grad_(), self.beta.requires_grad_(), self.g.permute(0, 3, 1, 2)

        def run():
            weight.grad = gamma.grad = beta.grad = None
            out = F.conv2d(x, weight, stride=self.stride)
            if with_bn:
                out = F.batch_norm(out, None, None, gamma, beta, training=True)
            out.backward(g)

        return run


@pytest.mark.parametrize("implementation", ["extension", "library", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", SHAPES)
def test_fprop(benchmark, layer, dtype, implementation):
    case = Case(layer, dtype)
    benchmark.group = f"projection fprop {layer} {dtype}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if implementation in KERNELS:
        benchmark(KERNELS[implementation].projection_fprop, case.x, case.weight, case.bn, case.stride)
    else:
        weight = case.weight[:, :, None, None].to(memory_format=torch.channels_last)
        benchmark(F.conv2d, case.x.permute(0, 3, 1, 2), weight, stride=case.stride)


@pytest.mark.parametrize("implementation", ["extension", "library", "conv", "conv + bn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", SHAPES)
def test_forward_and_backward(benchmark, layer, dtype, implementation):
    case = Case(layer, dtype)
    benchmark.group = f"projection forward and backward {layer} {dtype}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if implementation in KERNELS:
        benchmark(case.fused, KERNELS[implementation])
    else:
        benchmark(case.stock(with_bn=implementation == "conv + bn"))
