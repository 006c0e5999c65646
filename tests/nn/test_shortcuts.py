"""Options A, B and C."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastres.nn import ZeroPadShortcut, make_shortcut, projection_shortcut


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_zero_padding_takes_every_second_pixel_and_adds_zero_channels(size):
    x = torch.randn(2, 3, *size)
    y = ZeroPadShortcut(3, 7, stride=2)(x)
    assert y.shape == (2, 7, (size[0] + 1) // 2, (size[1] + 1) // 2)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()
    assert not list(ZeroPadShortcut(3, 7).parameters())


def test_zero_padding_cannot_remove_channels():
    with pytest.raises(ValueError, match="out_channels=3 is less than in_channels=7.*use a projection"):
        ZeroPadShortcut(7, 3)


@pytest.mark.parametrize(
    ("option", "where_dimensions_change", "elsewhere"),
    [("A", ZeroPadShortcut, type(None)), ("B", nn.Sequential, type(None)), ("C", nn.Sequential, nn.Sequential)],
)
def test_options(option, where_dimensions_change, elsewhere):
    assert type(make_shortcut(option, 4, 8)) is where_dimensions_change
    assert type(make_shortcut(option, 8, 8, stride=2)) is where_dimensions_change
    assert type(make_shortcut(option, 8, 8)) is elsewhere


def test_unknown_option():
    with pytest.raises(ValueError, match="shortcut='D' is not known; use 'A'"):
        make_shortcut("D", 4, 8)


def test_projection_has_torchvisions_keys():
    keys = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(projection_shortcut(4, 8, 2).state_dict()) == keys
