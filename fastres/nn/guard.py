"""What a fused unit cannot honour, asked at every call.

A fused unit reads the parameters of its children and does not call them, so whatever happens in a child's call (a hook,
a replaced forward, another class) would be lost, and a tracer would not see the children. Each function here returns
None, or the reason why the children have to run one by one, as a phrase that `fastres.explain` shows.

Children change after conversion, so nothing is cached. Modules are read through `__dict__`, which takes a tenth of the
time of `nn.Module.__getattr__`. Everything here traces under torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from fastres.functional import BatchNormParams

_PLAIN_TENSORS = (nn.Parameter, Tensor)  # functional_call and DataParallel put tensors where parameters were


def call_reason(x: Tensor) -> str | None:
    """What speaks against a fused call with this input, in the mode that PyTorch is in."""
    if type(x) not in _PLAIN_TENSORS:
        return "the input is not a plain tensor (a tensor subclass or a tracer's proxy)"
    if x.layout is not torch.strided or x.device.type not in ("cpu", "cuda", "meta"):
        return "the input is not a dense CPU, CUDA or meta tensor"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    # Not torch.compiler.is_exporting(): torch 2.11 answers True to it under torch.compile.
    if torch.compiler._is_exporting_flag:
        return "torch.export is recording"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if global_hooks._has_any_global_hook():
        return "a global module hook is registered"
    if x.numel() == 0:
        return "the input is empty"
    return None


def child_reason(name: str, child: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """A child must be exactly of its stock class, which parametrizations and SyncBatchNorm swap, and not hooked."""
    if type(child) is not kind:
        return f"{name} is {type(child).__name__}, not nn.{kind.__name__}"
    return own_call_reason(name, child)


def own_call_reason(name: str, module: nn.Module) -> str | None:
    """Whether something happens in the module's call besides its class's forward."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{name} has a hook"
    if "forward" in state:
        return f"{name} has a forward of its own"
    return None


def conv_reason(name: str, conv: nn.Module | None, *, may_have_bias: bool = False) -> str | None:
    """A conv must be a hook-free nn.Conv2d, padded with zeros by numbers, and have no bias unless it may."""
    reason = child_reason(name, conv, nn.Conv2d)
    if reason is not None:
        return reason
    state = conv.__dict__
    weight, bias = conv_weight(conv), conv_bias(conv)
    if type(weight) not in _PLAIN_TENSORS:
        return f"{name}.weight is {type(weight).__name__}, not a plain tensor"
    if bias is not None:
        if not may_have_bias:
            return f"{name} has a bias"
        if type(bias) not in _PLAIN_TENSORS:
            return f"{name}.bias is {type(bias).__name__}, not a plain tensor"
    if state["padding_mode"] != "zeros":
        return f"{name} pads with {state['padding_mode']!r}"
    for option in ("stride", "padding", "dilation"):
        if type(state[option]) is not tuple or len(state[option]) != 2:
            return f"{name} has {option}={state[option]!r}, not a pair"
    return None


def block_conv_reason(
    name: str,
    conv: nn.Module | None,
    kernel_size: int,
    *,
    stride: int | None = None,
    dilation: int | None = 1,
    groups: int | None = 1,
) -> str | None:
    """A conv of a block must also be square, padded to keep the size at stride 1, and of this shape; None is any."""
    reason = conv_reason(name, conv)
    if reason is not None:
        return reason
    state = conv.__dict__
    if state["kernel_size"] != (kernel_size, kernel_size):
        return f"{name} has kernel_size={state['kernel_size']}, not {kernel_size}"
    rows, columns = state["stride"]
    if rows != columns or (stride is not None and rows != stride):
        return f"{name} has stride={state['stride']}" + ("" if stride is None else f", not {stride}")
    rows, columns = state["dilation"]
    if kernel_size > 1 and (rows != columns or (dilation is not None and rows != dilation)):
        return f"{name} has dilation={state['dilation']}" + ("" if dilation is None else f", not {dilation}")
    padding = rows * (kernel_size - 1) // 2
    if state["padding"] != (padding, padding):
        return f"{name} has padding={state['padding']}, not {padding}"
    if groups is not None and state["groups"] != groups:
        return f"{name} has groups={state['groups']}, not {groups}"
    return None


def norm_reason(name: str, bn: nn.Module | None) -> str | None:
    """A norm must be a hook-free nn.BatchNorm2d whose state the fused update can follow."""
    reason = child_reason(name, bn, nn.BatchNorm2d)
    if reason is not None:
        return reason
    weight, bias, mean, var, counter = _norm_tensors(bn)
    if weight is not None and type(weight) not in _PLAIN_TENSORS:
        return f"{name}.weight is {type(weight).__name__}, not a plain tensor"
    if bias is not None and type(bias) not in _PLAIN_TENSORS:
        return f"{name}.bias is {type(bias).__name__}, not a plain tensor"
    if (mean is None) is not (var is None):
        return f"{name} has only one of running_mean and running_var"
    if counter is None and mean is not None and bn.__dict__["momentum"] is None:
        return f"{name} has momentum=None and no num_batches_tracked"
    return None


def conv_weight(conv: nn.Conv2d) -> Tensor:
    weight = conv.__dict__["_parameters"].get("weight")
    return conv.weight if weight is None else weight


def conv_bias(conv: nn.Conv2d) -> Tensor | None:
    parameters = conv.__dict__["_parameters"]
    # A replica of nn.DataParallel holds its parameters as plain attributes.
    return parameters["bias"] if "bias" in parameters else conv.bias


def batch_norm_params(bn: nn.BatchNorm2d) -> BatchNormParams:
    """What `bn.forward` would do now: which statistics it takes, and which it updates."""
    weight, bias, mean, var, counter = _norm_tensors(bn)
    state = bn.__dict__
    training = state["training"]
    if training and not state["track_running_stats"]:
        mean = var = None
    return BatchNormParams(weight, bias, mean, var, counter, training or mean is None, state["momentum"], state["eps"])


def _norm_tensors(bn: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean, running_var, num_batches_tracked."""
    state = bn.__dict__
    parameters, buffers = state["_parameters"], state["_buffers"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    # A replica of nn.DataParallel holds its parameters as plain attributes.
    return (
        bn.weight if weight is None else weight,
        bn.bias if bias is None else bias,
        buffers["running_mean"],
        buffers["running_var"],
        buffers["num_batches_tracked"],
    )
