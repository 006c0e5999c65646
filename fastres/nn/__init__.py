"""Modules: residual blocks and their parts, each fused, each with its stock form beside it.

`Stock...` classes run their children one by one; the fused class of the same name has the same children, parameters and
state_dict, and `fastres.convert` and `fastres.revert` swap one for the other. That of `Stage` is nn.Sequential.
"""

from .blocks import BasicBlock, Bottleneck, StockBasicBlock, StockBottleneck
from .conv_bn_relu import ConvBNReLU2d, StockConvBNReLU2d
from .projection import Projection, StockProjection
from .shortcuts import ZeroPadShortcut, make_shortcut, projection_shortcut
from .stage import Stage
from .stem import Stem, StockStem

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU2d",
    "Projection",
    "Stage",
    "Stem",
    "StockBasicBlock",
    "StockBottleneck",
    "StockConvBNReLU2d",
    "StockProjection",
    "StockStem",
    "ZeroPadShortcut",
    "make_shortcut",
    "projection_shortcut",
]
