"""What stock layers move, from their shapes alone: the check on what `Traffic` counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastres.conversion import find_units, revert

from .model import on_meta


def modelled_stock_bytes(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a forward and backward pass of the stock model, every tensor crossing memory once per use.

    A batch norm reads its input twice in forward, and twice two tensors in backward; a convolution's dgrad and wgrad
    each read the gradient; a block adds its shortcut, and the gradients of both branches. Left out: parameters of batch
    norms, the loss, zero-padding shortcuts. The arguments are those of `training_step`.
    """
    twin = revert(on_meta(model, dtype))
    blocks = [unit.module for unit in find_units(twin) if unit.name in ("basic_block", "bottleneck")]
    moved = 0

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += _layer(module, args[0], output)

    def add_shortcut(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += 3 * output.nbytes + 3 * args[0].nbytes

    for module in twin.modules():
        if isinstance(module, tuple(_LAYERS)):
            module.register_forward_hook(add)
    for block in blocks:
        block.register_forward_hook(add_shortcut)
    with torch.no_grad():
        twin(torch.empty(*input_shape, dtype=dtype, device="meta", requires_grad=False))
    return moved


def _layer(module: nn.Module, x: Tensor, y: Tensor) -> int:
    formula = next(formula for kind, formula in _LAYERS.items() if isinstance(module, kind))
    return formula(module, x.nbytes, y.nbytes, y.numel())


def _product(module: nn.Module, x: int, y: int, _: int) -> int:
    """fprop, dgrad and wgrad: each of the three tensors three times."""
    return 3 * (x + y + module.weight.nbytes)


_LAYERS = {
    nn.Conv2d: _product,
    nn.Linear: _product,
    nn.BatchNorm2d: lambda module, x, y, _: (2 * x + y) + (4 * x + y),
    nn.ReLU: lambda module, x, y, _: (x + y) + (2 * y + x),
    # The indices are 8 bytes each.
    nn.MaxPool2d: lambda module, x, y, count: 2 * (x + y + 8 * count),
    nn.AdaptiveAvgPool2d: lambda module, x, y, _: 2 * (x + y),
}
