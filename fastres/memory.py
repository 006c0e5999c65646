"""How much a forward pass keeps for its backward pass, measured."""

import weakref
from collections.abc import Iterable

import torch
from torch import nn


def saved_bytes(fn, *inputs, exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd holds between the forward and the backward pass of `fn(*inputs)`.

    Counts the unique storages behind the tensors that are alive in saved-tensor hooks (`torch.autograd.graph`) once the
    forward pass has returned. Two views of one storage count once, and a view of a large storage counts whole, because
    it keeps the whole alive. Counted: activations, the input itself where an operator saves it, weights cast by
    autocast. Not counted: parameters and buffers (they exist anyway), and tensors that a custom `autograd.Function`
    puts on its `ctx` instead of saving them.

    Args:
        fn: a module or a function of `inputs`.
        *inputs: passed on. Make them as training does: with `requires_grad` where a gradient flows back.
        exclude: tensors to leave out besides. For a module its parameters and buffers are left out anyway; for a
            function every `nn.Parameter` and view of one, but not the buffers of the modules that it calls.

    Returns:
        Bytes.

    Side effects are those of one forward pass: in training mode, batch norm moves its running statistics.
    """
    own = {_key(tensor) for tensor in exclude}
    if isinstance(fn, nn.Module):
        own.update(_key(tensor) for tensor in (*fn.parameters(), *fn.buffers()))
    held: list[weakref.ref] = []

    def pack(tensor: torch.Tensor) -> _Held:
        # Detached: a saved result carries its own grad_fn; held by the graph, it would keep both alive for ever.
        item = _Held(tensor.detach())
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            held.append(weakref.ref(item))
        return item

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        result = fn(*inputs)
    storages = {}
    for reference in held:
        item = reference()
        if item is not None:
            storages[_key(item.tensor)] = item.tensor.untyped_storage().nbytes()
    del result
    return sum(size for key, size in storages.items() if key not in own)


class _Held:
    """Lives exactly as long as the graph holds the tensor: a graph that died during the forward pass saves nothing."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
