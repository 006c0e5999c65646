"""Checks of what a caller hands to a fused unit; every message names the argument and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from ._batch_norm import BatchNormParams

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_input(
    unit: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, conv_weight: Tensor, groups: int = 1
) -> None:
    """Raise ValueError or TypeError where a unit whose first conv has this weight cannot read such an x.

    x must be `[N, C, H, W]` with C = conv_weight.shape[1]*groups, floating, on conv_weight's device and, outside
    autocast, of its dtype.
    """
    if len(shape) != 4:
        raise ValueError(f"{unit}: x must be [N, C, H, W], has {len(shape)} dimensions: {tuple(shape)}")
    channels = conv_weight.shape[1] * groups
    if shape[1] != channels:
        raise ValueError(
            f"{unit}: x must have {channels} channels (dimension 1), as the first conv's weight does, has {shape[1]}"
        )
    if 0 in shape:
        raise ValueError(f"{unit}: x is empty, {tuple(shape)}; skip it, or use the fastres.nn module, which takes it")
    if device != conv_weight.device:
        raise ValueError(f"{unit}: x is on {device} but the weights are on {conv_weight.device}; move one of them")
    if dtype not in DTYPES:
        raise TypeError(f"{unit}: x must be float64, float32, bfloat16 or float16, is {dtype}")
    if not _in_autocast(device) and dtype != conv_weight.dtype:
        raise TypeError(
            f"{unit}: x is {dtype} but the weights are {conv_weight.dtype}; convert one of them or use torch.autocast"
        )


def prepare_input(unit: str, x: Tensor, conv_weight: Tensor, groups: int = 1) -> Tensor:
    """x as the unit reads it: checked (`check_input`), in autocast's dtype where autocast is on, in channels_last
    memory.
    """
    check_input(unit, x.shape, x.dtype, x.device, conv_weight, groups)
    # Like autocast's convolution: float64 is left alone.
    if _in_autocast(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x.contiguous(memory_format=torch.channels_last)


def _in_autocast(device: torch.device) -> bool:
    # The meta device has no autocast, and asking for it raises.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_rows(params: BatchNormParams, shape: tuple[int, int, int, int]) -> None:
    """Raise PyTorch's ValueError where batch statistics would be taken over one value; shape `(N, C, H, W)`."""
    if params.batch_stats and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}; "
            "use a larger batch or image, or put the batch norm into eval mode"
        )


def check_shortcut(unit: str, shortcut: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """The ready-made shortcut, of the output's shape, in the unit's dtype and in channels_last memory."""
    if tuple(shortcut.shape) != tuple(shape):
        raise ValueError(f"{unit}: shortcut must have the output's shape {tuple(shape)}, has {tuple(shortcut.shape)}")
    return shortcut.to(dtype).contiguous(memory_format=torch.channels_last)


def check_identity(unit: str, x_shape: tuple[int, int, int, int], shape: tuple[int, int, int, int]) -> None:
    """Raise ValueError when x cannot be its own shortcut."""
    if tuple(x_shape) != tuple(shape):
        raise ValueError(
            f"{unit}: an identity shortcut needs an output of x's shape {tuple(x_shape)}, the block's is "
            f"{tuple(shape)}; pass a projection or a shortcut"
        )


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pixels along one axis of a convolution's output."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
