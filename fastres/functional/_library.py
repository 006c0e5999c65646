"""Registration of the fused units as `torch.library` operators, one per direction.

An operator keeps torch.compile, CUDA graphs and opcheck working around kernels they cannot see into. The training
operator names the running statistics that it updates in its schema; the operator for constant statistics is functional,
so that compiled inference carries no buffer mutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._batch_norm import (
    CONST_SCHEMA,
    TRAIN_SCHEMA,
    BatchNormConfig,
    const_args,
    train_args,
    unpack_const,
    unpack_train,
)

# A module global: when a Library object is collected its operators go with it.
LIBRARY = torch.library.Library("fastres", "DEF")

BODIES: dict[object, Callable] = {}
"""Each operator with its body, for counting what a unit moves: a dispatch mode sees one operator for each direction."""

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def define(name: str, schema: str, body: Callable, fake: Callable) -> Callable:
    """Register `fastres::name` with its body and its shape function; return the operator to call."""
    LIBRARY.define(name + schema)

    def outside_autocast(*args):
        # Autocast reaches into operator bodies: small float32 matrix products would silently run in bfloat16.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return body(*args)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, outside_autocast, key)
    torch.library.register_fake(f"fastres::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.fastres, name).default
    BODIES[operator] = body
    return operator


class ForwardOps:
    """A unit's forward as two operators, `<name>_train` and `<name>_const`, over one body.

    inputs: schema of the tensors that come first. returns: schema of the results, the unit's output first. body and
    fake are called as `(*inputs, bns, geometry, backend)`, with one `BatchNormParams` for each batch norm. They return
    NHWC tensors; the operator returns the first, the unit's output, as `[N, C, H, W]`.
    """

    def __init__(self, name: str, inputs: str, returns: str, body: Callable, fake: Callable):
        count = inputs.count("Tensor")

        def with_batch_norms(function: Callable, unpack: Callable) -> Callable:
            def call(*args):
                *state, geometry, backend = args[count:]
                out, *saved = function(*args[:count], unpack(*state), geometry, backend)
                # Without view tracking: autograd refuses in-place changes to an output that is a view made in here.
                with torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
                    return nchw(out), *saved

            return call

        def operator(kind: str, state: str, unpack: Callable) -> Callable:
            schema = f"({inputs}, {state}, int[] geometry, str backend) -> ({returns})"
            return define(f"{name}_{kind}", schema, with_batch_norms(body, unpack), with_batch_norms(fake, unpack))

        self.train = operator("train", TRAIN_SCHEMA, unpack_train)
        self.const = operator("const", CONST_SCHEMA, unpack_const)

    def __call__(
        self,
        inputs: tuple,
        bn: BatchNormConfig,
        state: Sequence[Tensor | None],
        geometry: Sequence[int],
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        """Run the operator that fits: `const` when no batch norm takes its statistics from the batch."""
        if any(bn.batch_stats):
            return self.train(*inputs, *train_args(bn, state), list(geometry), backend)
        return self.const(*inputs, *const_args(bn, state), list(geometry), backend)


def cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Conv weights as an operator takes them: in the activation dtype. Done once per step and saved for backward."""
    return [parameter.to(dtype) for parameter in parameters]


def weight_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad`, in acc, in the shape and strides of its weight, so that autograd accumulates it without a copy."""
    grad = grad.view(weight.shape)
    strides = zip(weight.shape, grad.stride(), weight.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return grad.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def parameter_grads(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """What operators give as `weight_grad`, in the dtype of the parameters."""
    return [None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]


def nhwc(x: Tensor) -> Tensor:
    """`[N, C, H, W]` as dense `[N, H, W, C]`; a view of channels_last memory, a copy of any other."""
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    """Dense `[N, H, W, C]` as channels_last `[N, C, H, W]`, a view."""
    return x.permute(0, 3, 1, 2)


class _RefuseDoubleBackward(torch.autograd.Function):
    """Identity on the gradients whose own backward raises."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "fastres: a gradient of a gradient was asked for (create_graph=True), which the fused blocks do not have. "
            "Call fastres.revert(model) first: the stock blocks support double backward."
        )


def refuse_double_backward(grads: list[Tensor | None], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under create_graph=True, hang the gradients on a node that raises; otherwise hand them on.

    `once_differentiable` is no substitute: its error node hangs on detached leaves, and a second derivative through a
    stock layer in front of the block comes out wrong without an error.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    present = [grad for grad in grads if grad is not None]
    wrapped = iter(_RefuseDoubleBackward.apply(len(present), *present, *(t for t in inputs if t is not None)))
    return tuple(None if grad is None else next(wrapped) for grad in grads)
