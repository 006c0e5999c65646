"""Convolutions of images padded to more channels: the same results as without."""

from __future__ import annotations

import pytest
import torch

from fastres.kernels import library, reference
from fastres.kernels.library import padded


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("stride, padding", [((2, 2), (3, 3)), ((1, 2), (0, 2))])
def test_padding_the_channels_changes_nothing(channels, stride, padding):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 10, 3).double(), torch.randn(16, 3, 7, 5).double()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = padded.conv2d(x, weight.contiguous(memory_format=memory_format), stride, padding, channels=channels)
        torch.testing.assert_close(y, reference.conv2d(x, weight, stride, padding))
    dw = padded.conv2d_wgrad(x, y, (7, 5), stride, padding, channels=channels)
    torch.testing.assert_close(dw, library.conv2d_wgrad(x, y, (7, 5), stride, padding))
