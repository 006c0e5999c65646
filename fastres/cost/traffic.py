"""What PyTorch's operators move and compute, counted while they run: on any device, the meta device included.

An operator reads each of its input tensors and writes each of its results once. Where the kernels behind it are known
to do otherwise (a batch norm in training reads its input for the statistics and again to normalise), the tables below
say so. What stays in a cache between two operators counts as moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastres.parts import Part

aten = torch.ops.aten


class Step(NamedTuple):
    """One kernel of ours, or one operator of PyTorch's.

    unit: path of the block in the model; "stem" and "head" for what stands before and behind the blocks. direction:
    "forward" or "backward". kernel: its name. backend: the namespace of `fastres.kernels` it is from, or "aten".
    bytes: moved. flops: of its matrix products, a multiply-add being two. seconds: the floor of both on a part.
    reason: why the plan took this namespace, where it chose for this call.
    """

    unit: str
    direction: str
    kernel: str
    backend: str
    bytes: int
    flops: int
    seconds: float
    reason: str = ""


class Total(NamedTuple):
    """Sums over steps."""

    bytes: int
    flops: int
    seconds: float


def total(steps: Sequence[Step]) -> Total:
    """What all steps move and compute, and their floors one after the other."""
    return Total(sum(s.bytes for s in steps), sum(s.flops for s in steps), sum(s.seconds for s in steps))


def tensors(value: object) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def touched(t: Tensor) -> int:
    """Bytes of the elements that `t` shows: those of a strided view only, those of an expanded one once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * t.element_size()


def _batch_norm(args: Sequence, training: int) -> list[Tensor]:
    return [args[0]] if args[training] else []


def _batch_norm_backward(args: Sequence) -> list[Tensor]:
    train, (need_x, *_) = args[7], args[9]
    return [args[0], args[1]] if train and need_x else []


_READ_AGAIN: dict[object, Callable[[Sequence], list[Tensor]]] = {
    # One pass for the statistics or sums, one that needs them.
    aten.native_batch_norm: lambda args: _batch_norm(args, 5),
    aten._native_batch_norm_legit: lambda args: _batch_norm(args, -3),
    aten.cudnn_batch_norm: lambda args: _batch_norm(args, 5),
    aten.native_batch_norm_backward: _batch_norm_backward,
    # The gradient goes into dgrad and into wgrad.
    aten.convolution_backward: lambda args: [args[0]] if all(args[10][:2]) else [],
}
"""Inputs that an operator reads a second time."""


def _not_for_one_direction(args: Sequence) -> list[Tensor]:
    """A dgrad does not read the input, a wgrad not the weights."""
    _, x, weight, *_, (need_x, need_weight, _) = args
    return [t for t, needed in ((x, need_weight), (weight, need_x)) if not needed]


_NOT_READ: dict[object, Callable[[Sequence], list[Tensor]]] = {
    aten.copy_: lambda args: [args[0]],
    aten.fill_: lambda args: [args[0]],
    aten.zero_: lambda args: [args[0]],
    aten.max_pool2d_with_indices_backward: lambda args: [args[1]],
    aten.convolution_backward: _not_for_one_direction,
}
"""Tensors that an operator takes and does not read."""

_MAKES = ("empty", "new_empty", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "rand", "arange")
"""Operators of these names and their `_like` forms read nothing; those that make empty memory do not write either."""


def _vectors(count: int) -> Callable[[Sequence], tuple[Tensor, ...]]:
    return lambda args: tuple(args[0].new_empty(args[0].shape[1], dtype=torch.float32) for _ in range(count))


def _convolution(args: Sequence) -> Tensor:
    x, weight = args[:2]
    y = aten.convolution.default(*args)
    if any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)):
        return y.contiguous(memory_format=torch.channels_last)
    return y


_META: dict[object, Callable[[Sequence], object]] = {
    aten.batch_norm_update_stats: _vectors(2),
    aten.batch_norm_backward_reduce: _vectors(4),
    aten.convolution: _convolution,
}
"""Results on the meta device as a GPU's, where PyTorch has none, or ones of other strides."""


def _convolution_backward_flops(*args, out_val) -> int:
    grad, weight, (need_x, need_weight, _) = args[0], args[2], args[10]
    return 2 * (need_x + need_weight) * grad.numel() * weight.shape[1:].numel()


_FLOPS = flop_registry | {
    # Up to torch 2.13 at least, PyTorch's formula takes the wgrad of a grouped convolution for a dense one.
    aten.convolution_backward: _convolution_backward_flops,
    # It has none for the product that adds in place.
    aten.addmm_: flop_registry[aten.addmm],
}
"""Formulas of operators with matrix products."""


class Operators(TorchDispatchMode):
    """Hands every operator of PyTorch's that runs inside to `ran`, once it has run; composite ones by their parts.

    expand: gives for an operator the function to run in its place, under the same mode, or None.
    """

    def __init__(self):
        super().__init__()
        self.expand: Callable[[object], Callable | None] = lambda func: None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inside = self.expand(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            # Below autograd, where the bodies of our operators run, composite operators arrive whole.
            with self:
                return func.decompose(*args, **kwargs)
        packet = func.overloadpacket
        on_meta = packet in _META and args[0].device.type == "meta"
        result = _META[packet](args) if on_meta else func(*args, **kwargs)
        self.ran(func, args, kwargs, result)
        return result

    def ran(self, func, args: Sequence, kwargs: dict, result: object) -> None:
        raise NotImplementedError


class Traffic(Operators):
    """Records every operator that runs inside as a `Step`, in `steps`, under the present `unit` and `direction`."""

    def __init__(self, part: Part):
        super().__init__()
        self.part = part
        self.steps: list[Step] = []
        self.unit, self.direction = "", "forward"

    def ran(self, func, args: Sequence, kwargs: dict, result: object) -> None:
        moved = _moved(func, args, kwargs, result)
        if moved:
            packet = func.overloadpacket
            formula = _FLOPS.get(packet)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            self.record(packet.__name__, "aten", moved, flops, tensors((args, result))[0].dtype)

    def record(self, kernel: str, backend: str, bytes: int, flops: int, dtype: torch.dtype, reason: str = "") -> None:
        """Add a step of its own."""
        seconds = self.part.seconds(bytes, flops, dtype)
        self.steps.append(Step(self.unit, self.direction, kernel, backend, bytes, flops, seconds, reason))


def _moved(func, args, kwargs, result) -> int:
    packet = func.overloadpacket
    name = packet.__name__.removesuffix("_like")
    if func.is_view or name in ("empty", "new_empty", "as_strided_"):
        return 0
    written = sum(map(touched, tensors(result)))
    if name in _MAKES:
        return written
    unread = {id(t) for t in _NOT_READ.get(packet, lambda args: [])(args)}
    read = [t for t in tensors((args, kwargs)) if id(t) not in unread]
    if not func._schema.is_mutable and any(t is given for t in tensors(result) for given in read):
        return 0  # what contiguous() and to() give back where there is nothing to do
    return written + sum(map(touched, (*read, *_READ_AGAIN.get(packet, lambda args: [])(args))))
