"""GPUs by name."""

from __future__ import annotations

import pytest
import torch

from fastres import parts


@pytest.mark.parametrize(
    "name, part",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B300", "h200"),
        (None, "h200"),
    ],
)
def test_a_devices_name_tells_the_part(name, part):
    assert parts.of_gpu(name) is parts.PARTS[part]


def test_a_floor_is_the_longer_of_memory_and_products():
    h200 = parts.PARTS["h200"]
    assert h200.seconds(4.8e12, 1.0, torch.bfloat16) == 1.0
    assert h200.seconds(1.0, 989.5e12, torch.bfloat16) == 1.0
    assert h200.seconds(4.8e12, 0, torch.int64) == 1.0, "no products, no rate"
    with pytest.raises(ValueError, match="int64 has no figures on H200 SXM; use bfloat16, float16, float32"):
        h200.seconds(1.0, 1.0, torch.int64)
