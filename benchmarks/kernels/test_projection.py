"""The projection shortcuts of ResNet-50 and ResNet-18, as wholes and kernel by kernel.

The baseline of a whole is eager's strided convolution, batch norm and, where there is one, residual add and ReLU, and
their autograd; that of a single kernel is eager's convolution in the same direction alone.
"""

from __future__ import annotations

import pytest
import torch

from fastres import cases
from fastres.measure import eager, kernels
from fastres.measure.shapes import PROJECTIONS

CORE = {"resnet50 layer1": ["cuda"], "resnet50 layer2": ["cuda"], "resnet50 layer3": ["cuda", "cpu"]}
LAYERS = [pytest.param(name, marks=pytest.mark.core(*CORE[name])) if name in CORE else name for name in PROJECTIONS]


def conv(stride):
    return lambda t: eager.conv(t["x"], t["conv_weight"], stride)


def backward(stride, **wanted):
    return lambda t: eager.conv_backward(t["g"], t["x"], t["conv_weight"], stride, **wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_with_batch_norm(layer, batch, dtype, device, measure):
    """Forward and backward, Gram-folded, of the projection and its batch norm; the gradient is added to dx."""
    projection = PROJECTIONS[layer]
    stride = projection.stride
    single = {
        "projection_fprop": conv(stride),
        "projection_dgrad": backward(stride, wgrad=False),
        "projection_wgrad": backward(stride, dgrad=False),
    }
    case = cases.BY_NAME[f"projection, stride {stride}"]
    measure(kernels.experiments(case, dtype, device, projection.sizes(batch), eager=single))


@pytest.mark.parametrize("layer", [name for name, projection in PROJECTIONS.items() if projection.stride == 2])
def test_between_two_relus(layer, batch, dtype, device, measure):
    """With constant statistics; a residual and a ReLU behind the projection, the mask of a ReLU in front of it."""
    case = cases.BY_NAME["projection, between two ReLUs"]
    single = {
        "projection_fprop, residual": conv(2),
        "projection_dgrad, out": backward(2, wgrad=False),
        "projection_wgrad, out": backward(2, dgrad=False),
    }
    measure(kernels.experiments(case, dtype, device, PROJECTIONS[layer].sizes(batch), eager=single))


@pytest.mark.parametrize("layer", [name for name, projection in PROJECTIONS.items() if projection.stride == 2])
def test_raw(layer, batch, dtype, device, measure):
    """The raw output and its statistics; eager's batch norm also writes its output."""

    def stock(t):
        torch.native_batch_norm(conv(2)(t), None, None, None, None, True, 0.1, 1e-5)

    case = cases.BY_NAME["projection, raw"]
    measure(kernels.experiments(case, dtype, device, PROJECTIONS[layer].sizes(batch), stock=stock))
