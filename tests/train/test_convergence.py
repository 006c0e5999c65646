"""200 training steps on real images: a fused network learns as the stock one does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastres
from fastres import models

STEPS, BATCH, WINDOW = 200, 32, 10

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 handwritten digits `[N, 1, 8, 8]` (Alpaydin and Kaynak, 1998) and what they are."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    return (images - images.mean()) / images.std(), torch.from_numpy(labels)


def curve(digits, seed: int, fused: bool, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The loss `[STEPS/WINDOW]` of a run, averaged over windows. seed: of the weights and of the images' order."""
    torch.manual_seed(seed)
    model = models.cifar_resnet11_bottleneck(in_channels=1, width=8)
    model = (fastres.convert(model) if fused else fastres.revert(model)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    images, labels = (t.to(device) for t in digits)
    order, losses = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH,), generator=order).to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).view(-1, WINDOW).mean(1).cpu()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_losses_stay_within_the_spread_of_two_stock_seeds(digits, device, dtype):
    """Fused and stock begin alike and drift apart as any two ways of rounding do, by less than another seed makes."""
    stock, other = (curve(digits, seed, False, device, dtype) for seed in (0, 1))
    fused = curve(digits, 0, True, device, dtype)
    assert stock[-1] < 0.1 * stock[0], "the stock network does not learn: nothing to compare"
    spread, difference = (other - stock).abs(), (fused - stock).abs()
    assert difference.any(), "to the bit as the stock network: it did not run fused"
    for windows in (slice(None), slice(-5, None)):
        assert difference[windows].mean() <= spread[windows].mean()
    assert difference.max() <= spread.max()
