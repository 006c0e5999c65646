"""What the model families share: stages of blocks, and the initial weights."""

from __future__ import annotations

from torch import nn

from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU2d, Stage, make_shortcut
from fastres.nn.blocks import StockBasicBlock, StockBottleneck

BLOCKS = ("basic", "bottleneck", "plain")


def make_stage(
    block: str,
    in_channels: int,
    planes: int,
    blocks: int,
    stride: int,
    *,
    shortcut: str | None = None,
    groups: int = 1,
    base_width: int = 64,
    stride_on_1x1: bool = False,
) -> tuple[nn.Sequential, int]:
    """A chain of blocks, the first with `stride`, and the channels of its output.

    block: "basic", "bottleneck", or "plain", two convs without a shortcut. shortcut: "A", "B" or "C", see
    `fastres.nn.make_shortcut`; None is "B". The others as in `fastres.nn.Bottleneck`. Raises ValueError for an unknown
    block or shortcut, and for options that the block does not have.
    """
    if block not in BLOCKS:
        raise ValueError(f"block={block!r} is not known; use one of {', '.join(map(repr, BLOCKS))}")
    if block != "bottleneck" and (groups, base_width, stride_on_1x1) != (1, 64, False):
        raise ValueError(f"groups, widths and stride_on_1x1 are options of block='bottleneck', not of {block!r}")
    if block == "plain":
        if shortcut is not None:
            raise ValueError(f"shortcut={shortcut!r}: a plain network has no shortcuts; leave it out")
        layers = [ConvBNReLU2d(in_channels, planes, stride=stride)]
        layers += [ConvBNReLU2d(planes, planes) for _ in range(2 * blocks - 1)]
        return nn.Sequential(*layers), planes
    block_class, options = BasicBlock, {}
    if block == "bottleneck":
        block_class, options = Bottleneck, {"stride_on_1x1": stride_on_1x1}
    out_channels = planes * block_class.expansion
    layers = []
    for _ in range(blocks):
        downsample = make_shortcut(shortcut or "B", in_channels, out_channels, stride)
        layers.append(block_class(in_channels, planes, stride, downsample, groups, base_width, **options))
        in_channels, stride = out_channels, 1
    return (Stage if blocks > 1 else nn.Sequential)(*layers), out_channels


def initialize(model: nn.Module, zero_init_residual: bool = False) -> None:
    """The initial weights: normal with variance 2/(out_channels*kernel area) for convs; 1 and 0 for batch norms.

    The last layer keeps nn.Linear's. With `zero_init_residual` the last batch norm of each block starts at 0. Sources:
    He et al., "Delving Deep into Rectifiers" (2015), section 2.2, backward case; Goyal et al., "Accurate, Large
    Minibatch SGD" (2017), section 5.1.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if not zero_init_residual:
        return
    blocks = [module for module in model.modules() if isinstance(module, (StockBasicBlock, StockBottleneck))]
    if not blocks:
        raise ValueError("zero_init_residual=True: a plain network has no residual blocks; leave it out")
    for block in blocks:
        nn.init.zeros_((block.bn3 if isinstance(block, StockBottleneck) else block.bn2).weight)
