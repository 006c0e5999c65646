"""A training step captured in a CUDA graph: its kernels never wait for the host and allocate alike each time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import fastres
from fastres import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"),
]


def trained(model, batches, capture: bool):
    """The model after a step on each batch; with `capture` all but the first three are replays of one graph."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, labels = batches[0].clone(memory_format=torch.preserve_format), torch.arange(len(batches[0]), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()

    def run(batch, compute):
        x.copy_(batch)
        compute()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:3]:
            optimizer.zero_grad()
            run(batch, step)
    torch.cuda.current_stream().wait_stream(stream)
    compute = step
    if capture:
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad()
        with torch.cuda.graph(graph):
            step()
        compute = graph.replay
    for batch in batches[3:]:
        if not capture:
            optimizer.zero_grad()
        run(batch, compute)
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_replays_train_as_eager_steps_do(name, monkeypatch):
    """Parameters, running statistics and the batch counters, to the bit."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    model = fastres.convert(models.create(name, num_classes=8)).to("cuda", memory_format=torch.channels_last)
    batches = [torch.randn(8, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last) for _ in range(6)]
    eager = trained(copy.deepcopy(model), batches, capture=False).state_dict()
    replayed = trained(model, batches, capture=True).state_dict()
    assert replayed["bn1.num_batches_tracked"].item() == len(batches)
    for key, value in eager.items():
        assert value.isfinite().all(), key
        assert torch.equal(replayed[key], value), key
