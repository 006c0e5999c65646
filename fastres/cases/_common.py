"""What a case is, how its inputs are made, and the stock operators that it is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import reference

Inputs = dict[str, object]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One use of one or a few kernels: inputs, the calls, and the same by stock operators.

    name: unique.
    kernels: the names that `run` calls.
    make: `make(maker, **sizes)` gives the inputs.
    run: `run(k, t)` calls the launchers of namespace k on inputs t and names every result. Partial sums are added up,
        so that results of two namespaces can be compared.
    stock: `stock(t)`, the same results by PyTorch's own operators, rounding as eager mode does.
    sizes: those that `fastres verify` uses.
    static: dtypes and sizes for which the Triton kernels are compiled offline, one of each configuration; bfloat16
        stands for float16 too.
    tiles: how many of the tiles that a Triton GEMM can choose from `static` is for, the preferred one first.
    small: what of the sizes in `static` is made smaller for Triton's interpreter, and leaves the configuration.
    """

    name: str
    kernels: tuple[str, ...]
    make: Callable[..., Inputs]
    run: Callable[[SimpleNamespace, Inputs], Results]
    stock: Callable[[Inputs], Results]
    sizes: dict[str, object] = field(default_factory=dict)
    static: tuple[tuple[torch.dtype, dict[str, object]], ...] = ()
    tiles: int = 1
    small: dict[str, object] = field(default_factory=lambda: {"n": 2, "h": 5, "w": 7})


class Maker:
    """Makes inputs from a seed. On the meta device tensors have shapes only, of any size."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, torch.device(device)
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(seed)

    def _random(self, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.float64, device="meta")
        return draw(shape, generator=self._generator, dtype=torch.float64).to(self.device)

    def activation(self, *shape: int, mean: float = 0.0) -> Tensor:
        """Normal values of standard deviation 1 in the activation dtype."""
        return (self._random(shape, torch.randn) + mean).to(self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """He-initialised weights `[K, C, ...]` in the activation dtype, in channels_last memory as a model's."""
        fan_in = max(1, torch.Size(shape[1:]).numel())
        weight = (self._random(shape, torch.randn) * (2 / fan_in) ** 0.5).to(self.dtype)
        return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight

    def vector(self, channels: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        """Uniform values `[C]` in acc."""
        return (self._random((channels,), torch.rand) * (high - low) + low).to(self.acc)

    def bn(self, y: Tensor, eps: float = 1e-5) -> Tensor:
        """`bn` `[4, C]` of y's own statistics, with gamma in 0.5..1.5 and beta in -0.5..0.5."""
        rows = y.reshape(-1, y.shape[-1]).double()
        mean = rows.sum(0) / max(1, rows.shape[0])
        rstd = ((rows - mean).square().sum(0) / max(1, rows.shape[0]) + eps).rsqrt()
        scale = self.vector(y.shape[-1]) * rstd
        shift = self.vector(y.shape[-1], -0.5, 0.5) - mean * scale
        return torch.stack([mean, rstd, scale, shift]).to(self.acc)

    def constants(self, y: Tensor) -> Tensor:
        """`bn` `[4, C]` of running statistics that are not y's own."""
        return self.bn(self.activation(8, 1, 1, y.shape[-1], mean=0.25))


def map_tensors(t: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor changed."""
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in t.items()}


def exact_inputs(t: Inputs) -> Inputs:
    """The same values in float64; each tensor a copy, as kernels update some in place."""
    return map_tensors(t, lambda value: value.clone().double() if value.is_floating_point() else value.clone())


def copied(t: Inputs) -> Inputs:
    """The same inputs, each tensor a copy."""
    return map_tensors(t, Tensor.clone)


def rows(t: Tensor) -> Tensor:
    """`[N, H, W, C]` as `[M, C]`."""
    return t.reshape(-1, t.shape[-1])


def nchw(t: Tensor) -> Tensor:
    """NHWC as stock operators see it: channels_last memory."""
    return t.permute(0, 3, 1, 2)


def nhwc(t: Tensor) -> Tensor:
    """The reverse of `nchw`."""
    return t.permute(0, 2, 3, 1)


def batch_norm(y: Tensor, bn: Tensor) -> Tensor:
    """ATen's batch norm of y (NHWC) with the statistics, gamma and beta that `bn` was formed from."""
    mean, rstd, scale, shift = bn
    # F.batch_norm of torch 2.11 refuses an eps of 0, which the variance has in it here.
    gamma, beta = scale / rstd, shift + mean * scale
    return nhwc(torch.batch_norm(nchw(y), gamma, beta, mean, rstd**-2, False, 0.0, 0.0, False))


def batch_norm_backward(g: Tensor, y: Tensor, bn: Tensor, constant: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """ATen's backward of `batch_norm` in training mode, or with constant statistics: dy (NHWC), dgamma, dbeta."""
    mean, rstd, scale, _ = bn
    dy, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        nchw(g), nchw(y), scale / rstd, mean, rstd**-2, mean, rstd, not constant, 0.0, [True, True, True]
    )
    return nhwc(dy), dgamma, dbeta


def statistics(y: Tensor) -> Results:
    """Mean and variance of every channel as ATen's batch norm computes them."""
    _, mean, rstd = torch.native_batch_norm(nchw(y), None, None, None, None, True, 0.0, 1e-5)
    return {"mean": mean, "var": rstd**-2 - 1e-5}


def relu_backward(g: Tensor, out: Tensor) -> Tensor:
    """ATen's backward of ReLU."""
    return torch.ops.aten.threshold_backward(g, out, 0)


def conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """`F.conv2d` with 1x1 weights `[K, C]`; x and the result are NHWC."""
    return nhwc(F.conv2d(nchw(x), weight[:, :, None, None], stride=stride))


def merged(stats) -> Results:
    """Mean and biased variance `[C]` of Welford partials, merged in float64."""
    count, mean, m2 = (part.double() for part in stats)
    total = count.sum()
    whole = (count[:, None] * mean).sum(0) / total
    return {"mean": whole, "var": (m2 + count[:, None] * (mean - whole).square()).sum(0) / total}


def backward_vectors(g: Tensor, y: Tensor, bn: Tensor) -> Tensor:
    """`grad` `[4, C]` that belongs to g, y and bn, from float64 sums."""
    sums = reference.bn_bwd_reduce(g.double(), y.double(), bn.double())[0]
    return reference.bn_bwd_finalize(sums, bn.double(), max(1, rows(y).shape[0])).to(bn.dtype)


def affine_grads(k, sums: Tensor, bn: Tensor) -> Results:
    """dgamma and dbeta from the partial sums of a batch norm's backward.

    The vectors b and c are differences that may cancel: they are judged in the dy that they form.
    """
    dgamma, dbeta, _, _ = k.bn_bwd_finalize(sums, bn, None)
    return {"dgamma": dgamma, "dbeta": dbeta}
