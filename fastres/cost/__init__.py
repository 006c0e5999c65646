"""The cost model: bytes, FLOPs and floor times of kernels, units and models."""

from . import flops
from .comparison import Comparison, compare
from .counting import count
from .model import SCHEMES, training_step
from .stock import modelled_stock_bytes
from .traffic import Step, Total, total

__all__ = [
    "SCHEMES",
    "Comparison",
    "Step",
    "Total",
    "compare",
    "count",
    "modelled_stock_bytes",
    "total",
    "training_step",
]

flops.register()
