"""The projection shortcut as a module of its own, for networks that keep it apart from their blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastres import functional

from .fused import FusedUnit
from .guard import batch_norm_params, block_conv_reason, conv_weight, norm_reason


class StockProjection(nn.Sequential):
    """`Projection` with its children run one by one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels))


class FusedProjection(FusedUnit):
    """Runs the children `0`, a 1x1 conv, and `1`, its batch norm, through `fastres.functional.projection`."""

    unit = "projection"

    def fused_reason(self) -> str | None:
        get = self.__dict__["_modules"].get
        return block_conv_reason("0", get("0"), 1) or norm_reason("1", get("1"))

    def fused_forward(self, x: Tensor) -> Tensor:
        modules = self.__dict__["_modules"]
        conv, bn = modules["0"], modules["1"]
        stride = conv.__dict__["stride"][0]
        return functional.projection(x, conv_weight(conv), batch_norm_params(bn), stride=stride, backend=self.backend)


class Projection(FusedProjection, StockProjection):
    """BN(conv(x)) with a strided 1x1 conv, fused: options B and C of He et al. (2015), section 3.3.

    state_dict keys as torchvision's `downsample`: `0.weight` and `1.*`. A block of `fastres.nn` takes the children of a
    plain nn.Sequential (`projection_shortcut`) into its own operator; give it that, not this.

    `[N, in_channels, H, W]` -> `[N, out_channels, ceil(H/stride), ceil(W/stride)]`.

    Args:
        in_channels, out_channels, stride: of the conv, which has no bias.
        norm_layer: makes a norm from a number of channels; with others than nn.BatchNorm2d the children run one by one.

    The attribute `backend` chooses the kernels, see `fastres.backends.CHOICES`.
    """

    stock_class = StockProjection
