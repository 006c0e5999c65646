"""Other libraries whose models fastres converts."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

_LIBRARIES = []  # the operators of a Library go when it is collected


@pytest.fixture(scope="session")
def torchvision_models():
    """`torchvision.models`, or a skip with the reason.

    A torchvision built for CUDA cannot load its operators beside a CPU build of torch, and then fails to import because
    it registers shape functions for two operators that do not exist: they are declared first. No model uses them.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or torch.version.cuda is not None:
            pytest.skip(f"torchvision does not import: {error}")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    return importlib.import_module("torchvision.models")
