"""ResNets built from `fastres.nn`: one function for each model, `create` and `names` to choose by name."""

from __future__ import annotations

import difflib

from torch import nn

from .cifar import (
    CifarResNet,
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
    cifar_resnet11_bottleneck,
    cifar_resnet20,
    cifar_resnet20_bottleneck,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
)
from .resnet import (
    ResNet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
)

_FUNCTIONS = (
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    wide_resnet50_2,
    resnext50_32x4d,
    plain18,
    plain34,
    cifar_resnet11_bottleneck,
    cifar_resnet20,
    cifar_resnet20_bottleneck,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
)
_MODELS = {function.__name__: function for function in _FUNCTIONS}

__all__ = ["CifarResNet", "ResNet", "create", "image_shape", "names", *_MODELS]


def names() -> list[str]:
    """Names of the models."""
    return list(_MODELS)


def image_shape(name: str) -> tuple[int, int, int]:
    """`(C, H, W)` of the images that the model `name` was made for: CIFAR's, or ImageNet's at the usual crop."""
    return (3, 32, 32) if name.startswith("cifar_") else (3, 224, 224)


def create(name: str, **options) -> nn.Module:
    """The model `name` with fresh weights; the options are those of `ResNet` or `CifarResNet`.

    Raises ValueError for an unknown name.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3) or list(_MODELS)
        raise ValueError(f"model {name!r} is not known; did you mean {', '.join(close)}?")
    return _MODELS[name](**options)
