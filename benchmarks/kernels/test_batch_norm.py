"""The batch norm kernels against eager PyTorch: on CUDA Triton's in bfloat16, on a CPU the library's in float32."""

from __future__ import annotations

import pytest
import torch

from fastres import cases, plan

CASES = (
    "bn_act, shortcut none, ReLU",
    "bn_act, shortcut identity, ReLU",
    "bn_act, shortcut projected, ReLU",
    "bn_bwd_reduce, mask output",
    "bn_bwd_reduce, mask output, two branches",
    "bn_bwd_apply, mask output, shortcut identity",
    "bn_bwd_apply, mask output, shortcut projected",
)
if torch.cuda.is_available():
    DTYPE = torch.bfloat16
    SHAPES = ((64, 56, 56, 64), (64, 56, 56, 256), (64, 14, 14, 1024), (64, 7, 7, 2048))
else:
    DTYPE = torch.float32
    SHAPES = ((8, 28, 28, 64),)


@pytest.mark.parametrize("implementation", ["ours", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_batch_norm(name, shape, implementation, device, benchmark, measure):
    case = cases.BY_NAME[name]
    n, h, w, c = shape
    t = case.make(cases.Maker(DTYPE, device), n=n, h=h, w=w, c=c)
    benchmark.group = f"{name}, {shape}, {DTYPE}, {device.type}"
    k = plan.resolve(DTYPE, device)
    benchmark.extra_info["kernels"] = plan.origins(DTYPE, device)[case.kernels[0]]
    tensors = [*t.values(), *case.run(k, t).values()]
    moved = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    measure((lambda: case.run(k, t)) if implementation == "ours" else (lambda: case.stock(t)), moved)
