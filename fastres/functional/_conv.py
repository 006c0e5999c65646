"""The convolution of a fused unit, by the kernels that its shape has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from fastres.kernels.reference.batch_norm import ChannelStats
from fastres.kernels.reference.conv2d import Pair

from ._checks import output_size


class Conv(NamedTuple):
    """A convolution by `conv1x1` or `conv3x3`. weight: `[K, C]`, or `[K, C/groups, 3, 3]` with padding = dilation."""

    weight: Tensor
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def geometry(self) -> tuple[int, int, int]:
        """stride, dilation and groups, as `conv3x3` takes them."""
        return self.stride, self.dilation, self.groups

    def output_shape(self, x: tuple[int, ...]) -> tuple[int, ...]:
        """NHWC shape of the output for an NHWC input of shape x."""
        n, h, w, _ = x
        kernel, padding = (1, 0) if self.weight.dim() == 2 else (3, self.dilation)
        ho, wo = (output_size(size, kernel, self.stride, padding, self.dilation) for size in (h, w))
        return n, ho, wo, self.weight.shape[0]

    def fprop(self, k: SimpleNamespace, x: Tensor, with_stats: bool) -> tuple[Tensor, ChannelStats | None]:
        """y and, with `with_stats`, its statistics."""
        if self.weight.dim() == 2:
            return k.conv1x1(x, self.weight, self.stride, with_stats)
        return k.conv3x3(x, self.weight, *self.geometry, with_stats)

    def dgrad(
        self,
        k: SimpleNamespace,
        dy: Tensor,
        x: Tensor,
        residual: Tensor | None = None,
        keep_residual: bool = False,
        mask_input: bool = False,
    ) -> Tensor:
        """dx, of the shape of x, plus `residual`, whose memory it may take unless `keep_residual`; masked by x, where
        that is a ReLU's output, with `mask_input`.
        """
        added = {"residual": residual, "mask": x if mask_input else None}
        if self.weight.dim() == 2:
            hw = x.shape[1:3]
            return k.conv1x1_dgrad(dy, self.weight, hw, self.stride, **added, keep_residual=keep_residual)
        return k.conv3x3_dgrad(dy, self.weight, x.shape[1:3], *self.geometry, **added)[0]

    def wgrad(self, k: SimpleNamespace, x: Tensor, dy: Tensor) -> Tensor:
        """dW in acc, of the shape of `weight`."""
        if self.weight.dim() == 2:
            return k.conv1x1_wgrad(x, dy, self.stride)
        return k.conv3x3_wgrad(x, dy, *self.geometry)


class GeneralConv(NamedTuple):
    """A convolution of any shape, by `conv2d`. weight: `[K, C/groups, R, S]`."""

    weight: Tensor
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair, int]:
        """stride, padding, dilation and groups, as `conv2d` takes them."""
        return self[1:]

    def output_shape(self, x: tuple[int, ...]) -> tuple[int, ...]:
        """As `Conv.output_shape`."""
        n, *hw, _ = x
        sizes = zip(hw, self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        ho, wo = (output_size(*size) for size in sizes)
        return n, ho, wo, self.weight.shape[0]

    def fprop(self, k: SimpleNamespace, x: Tensor, with_stats: bool) -> tuple[Tensor, ChannelStats | None]:
        """As `Conv.fprop`."""
        y = k.conv2d(x, self.weight, *self.geometry)
        return y, k.channel_stats(y) if with_stats else None

    def dgrad(self, k: SimpleNamespace, dy: Tensor, x: Tensor) -> Tensor:
        """dx, of the shape of x."""
        return k.conv2d_dgrad(dy, self.weight, x.shape[1:3], *self.geometry)

    def wgrad(self, k: SimpleNamespace, x: Tensor, dy: Tensor) -> Tensor:
        """As `Conv.wgrad`."""
        return k.conv2d_wgrad(x, dy, self.weight.shape[2:], *self.geometry)

    def by_its_shape(self) -> Conv | GeneralConv:
        """The same convolution by the kernels that are made for its shape, where there are any."""
        # Of images `conv2d` is the kernel that may pad the channels.
        if self.stride[0] == self.stride[1] and self.weight.shape[1] * self.groups > 3:
            kernel = tuple(self.weight.shape[2:])
            if kernel == (1, 1) and self.padding == (0, 0) and self.groups == 1:
                return Conv(self.weight.flatten(1), self.stride[0])
            if kernel == (3, 3) and self.padding == self.dilation and self.dilation[0] == self.dilation[1]:
                return Conv(self.weight, self.stride[0], self.dilation[0], self.groups)
        return self
