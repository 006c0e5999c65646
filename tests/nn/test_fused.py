"""Classes made at run time: copies, pickles, replicas."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastres
from fastres.nn import Bottleneck, StockBottleneck, projection_shortcut
from fastres.nn.blocks import FusedBottleneck
from fastres.nn.fused import fused_class


class UserBottleneck(StockBottleneck):
    """A stock block of the user's own, whose fused class has no name that pickle could find."""


def user_block() -> UserBottleneck:
    torch.manual_seed(0)
    return UserBottleneck(8, 2, downsample=projection_shortcut(8, 8)).double()


def test_one_class_per_stock_class():
    assert fused_class(FusedBottleneck, UserBottleneck) is fused_class(FusedBottleneck, UserBottleneck)
    first, second = fastres.convert(user_block()), fastres.convert(user_block())
    assert type(first) is type(second)
    assert isinstance(first, UserBottleneck)
    assert type(first).__name__ == "FusedUserBottleneck"
    assert type(first).__module__.startswith("fastres.")


def save_and_load(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": save_and_load,
    **{f"pickle {p}": lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("own", [False, True], ids=["made at run time", "fastres' own"])
def test_copies_stay_fused_and_keep_the_backend(how, own, fused_calls):
    block = Bottleneck(8, 2).double() if own else user_block()
    fastres.convert(block, backend="reference")
    block.eval()
    copied = COPIES[how](block)
    assert type(copied) is type(block)
    assert copied is not block
    assert copied.backend == "reference"
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert torch.equal(copied(x), block(x))
    assert fused_calls == {"bottleneck": 2}
    assert type(fastres.revert(copied)) is type(block).stock_class


def test_replicas_of_data_parallel(fused_calls, replicate):
    block = fastres.convert(user_block())
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    replica = replicate(block)
    assert not replica.conv1._parameters.get("weight")
    replica(x).square().sum().backward()
    gradients = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    block(x).square().sum().backward()
    for replicated, parameter in zip(gradients, block.parameters(), strict=True):
        torch.testing.assert_close(replicated, parameter.grad, rtol=1e-12, atol=1e-12)
    assert fused_calls == {"bottleneck": 2}


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, **options):
        super().__init__()
        self.block = block
        self.options = options

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, **self.options) if self.options else self.block(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant, run, assert_equal_in_float64):
    torch.manual_seed(0)
    block = Bottleneck(8, 2).double()
    for bn in (block.bn1, block.bn2, block.bn3):
        bn.momentum = 0.0  # the second forward pass would move the statistics again, as stock's does
    twin = copy.deepcopy(block)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    ours = run(Checkpointed(twin, use_reentrant=use_reentrant), x)
    expected = run(Checkpointed(block), x)
    for name in [name for name in ours if name.endswith("num_batches_tracked")]:
        assert ours.pop(name) == expected.pop(name) + 1 == 2
    assert_equal_in_float64(ours, expected)


def test_double_backward_raises(fused_calls):
    block = Bottleneck(8, 2).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastres\.revert\(model\)"):
        gradient.square().sum().backward()
    assert fused_calls == {"bottleneck": 1}
