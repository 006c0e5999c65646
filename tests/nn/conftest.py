"""Watching fused calls, and running a module beside its stock twin."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import nn

import fastres
from fastres import functional


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts the calls of each function of `fastres.functional` by name."""
    counts = collections.Counter()

    def watched(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("basic_block", "bottleneck", "conv_bn_relu", "projection", "stage", "stem"):
        monkeypatch.setattr(functional, name, watched(name, getattr(functional, name)))
    return counts


@pytest.fixture
def stock_twin():
    """A function that gives the stock copy of a fused module."""
    return lambda module: fastres.revert(copy.deepcopy(module))


@pytest.fixture
def run():
    """A function that runs forward and backward and gives every number that results, by name."""

    def run(module, x, generator_seed=0):
        x = x.detach().clone().requires_grad_(x.requires_grad)
        y = module(x)
        results = {"output": y.detach()}
        if y.requires_grad:
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(generator_seed), dtype=torch.float64)
            y.backward(g.to(y.dtype))
        results["grad x"] = x.grad
        results |= {f"grad {name}": parameter.grad for name, parameter in module.named_parameters()}
        results |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
        return results

    return run


@pytest.fixture
def replicate():
    """A function that makes a replica as nn.DataParallel does: `_parameters` emptied, the tensors plain attributes."""

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter * 1)
        for name, child in module._modules.items():
            setattr(replica, name, replicate(child))
        return replica

    return replicate


@pytest.fixture
def assert_equal_in_float64():
    """A function that compares two results of `run` to 1e-10 of each tensor's norm."""

    def check(ours, stock):
        assert ours.keys() == stock.keys()
        for name, expected in stock.items():
            actual = ours[name]
            assert (actual is None) == (expected is None), name
            if expected is not None:
                assert actual.dtype == expected.dtype, name
                assert torch.linalg.vector_norm((actual - expected).double()) <= 1e-10 * torch.linalg.vector_norm(
                    expected.double()
                ), name

    return check
