"""Whole models: a training step split into forward, backward and optimizer, and inference."""

from __future__ import annotations

import pytest

from fastres.measure import modules, training

# Most important first: a time budget may end before the last.
TRAINING = [
    pytest.param("resnet50", 224, marks=pytest.mark.core("cuda")),
    pytest.param("resnet18", 224, marks=pytest.mark.core("cuda")),
    pytest.param("cifar_resnet11_bottleneck", 32, marks=pytest.mark.core("cpu")),
    pytest.param("resnet101", 224),
    pytest.param("resnet152", 224),
    pytest.param("resnet34", 224),
    pytest.param("cifar_resnet20", 32),
]
INFERENCE = [
    pytest.param("resnet50", 224, marks=pytest.mark.core("cuda")),
    pytest.param("cifar_resnet11_bottleneck", 32, marks=pytest.mark.core("cpu")),
    pytest.param("resnet18", 224),
]


@pytest.mark.parametrize(("model", "size"), TRAINING)
def test_training(model, size, batch, dtype, device, measure, modes):
    # Compiling in all modes takes minutes, on a CPU for the smallest model too.
    compiled = modes(*modules.COMPILE_MODES) if device.type == "cuda" else modes("default")
    measure([training.model_training(model, (batch, 3, size, size), dtype, device, compiled)])


@pytest.mark.parametrize(("model", "size"), INFERENCE)
def test_inference(model, size, batch, dtype, device, measure, modes):
    compiled = modes("default") if device.type == "cuda" else modes()
    measure([training.model_inference(model, (batch, 3, size, size), dtype, device, compiled)])
