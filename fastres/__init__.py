"""Fused residual blocks for PyTorch: the same weights, the same state_dict, the same numbers, less memory traffic.

    model = fastres.convert(model)      # fuse a ResNet's blocks, in place
    print(fastres.explain(model))       # block by block: fused how, or not and why
    fastres.revert(model)               # the stock modules again

Importing this package imports nothing else, torch included; what is used is imported then.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import backends, cost, functional, memory, models, nn, plan
    from .conversion import convert, revert
    from .explanation import explain

__all__ = ["backends", "convert", "cost", "explain", "functional", "memory", "models", "nn", "plan", "revert"]
__version__ = importlib.metadata.version("fastres")

_FUNCTIONS = {"convert": ".conversion", "explain": ".explanation", "revert": ".conversion"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    return importlib.import_module("." + name, __name__)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
