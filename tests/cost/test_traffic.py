"""What is counted as moved, operator by operator."""

import pytest
import torch
from torch.nn import functional as F

from fastres.cost.traffic import Traffic, touched
from fastres.parts import PARTS

A = 2 * 8 * 5 * 5 * 4  # bytes of `a`


@pytest.fixture(params=["cpu", "meta"])
def a(request):
    return torch.ones(2, 8, 5, 5, device=request.param)


def steps(call):
    with Traffic(PARTS["h200"]) as traffic:
        call()
    return traffic.steps


def moved(call):
    return sum(step.bytes for step in steps(call))


def test_touched_is_what_a_view_shows():
    t = torch.zeros(4, 6)
    assert touched(t) == 96
    assert touched(t[:, ::2]) == 48
    assert touched(t[:1].expand(4, 6)) == 24
    assert touched(t[:0].expand(0, 6)) == 0
    assert touched(t[0, 0]) == 4


@pytest.mark.parametrize(
    "call, passes",
    [
        (lambda a: a + a, 3),
        (lambda a: a.relu(), 2),
        (lambda a: a.clone().relu_(), 4),
        (lambda a: a.clone(), 2),
        (lambda a: torch.empty_like(a), 0),
        (lambda a: torch.zeros_like(a), 1),
        (lambda a: torch.empty_like(a).zero_(), 1),
        (lambda a: torch.empty_like(a).copy_(a), 2),
        (lambda a: a.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 0),
        (lambda a: a.contiguous().to(a.dtype), 0),
        (lambda a: a.to(torch.float64), 3),
        (lambda a: F.batch_norm(a, None, None, None, None, training=True), 3),
    ],
)
def test_passes_over_memory(call, passes, a):
    total = moved(lambda: call(a))
    assert passes * A <= total <= passes * A + 200  # the vectors of a batch norm


def test_a_strided_view_counts_for_what_it_shows(a):
    assert moved(lambda: a[:, :, ::2, ::2].add_(1)) == 2 * (2 * 8 * 3 * 3 * 4)


def test_both_directions_of_stock_layers(a):
    weight = torch.ones(4, 8, 3, 3, device=a.device, requires_grad=True)
    a.requires_grad_()
    y = A // 2
    forward = steps(lambda: F.conv2d(a, weight, padding=1))
    assert [step.bytes for step in forward] == [A + weight.nbytes + y]
    out = F.conv2d(a, weight, padding=1)
    (backward,) = [step for step in steps(lambda: out.sum().backward()) if step.kernel == "convolution_backward"]
    # The gradient, a stride-0 tensor here, goes into dgrad and into wgrad.
    assert backward.bytes == 2 * (A + weight.nbytes) + 2 * 4
    assert backward.flops == 2 * forward[0].flops == 2 * 2 * (y // 4) * 8 * 9


def test_batch_norm_backward_reads_two_tensors_twice(a):
    a.requires_grad_()
    weight, bias = (torch.ones(8, device=a.device, requires_grad=True) for _ in range(2))
    out = F.batch_norm(a, None, None, weight, bias, training=True)
    g = torch.ones_like(out)
    (backward,) = [step for step in steps(lambda: out.backward(g)) if "batch_norm_backward" in step.kernel]
    assert 5 * A < backward.bytes < 5 * A + 400


def test_flops_of_grouped_convolutions():
    x = torch.ones(2, 32, 8, 8, device="meta", requires_grad=True)
    weight = torch.ones(32, 4, 3, 3, device="meta", requires_grad=True)
    out = F.conv2d(x, weight, padding=1, groups=8)
    backward = [step for step in steps(lambda: out.sum().backward()) if step.flops]
    assert [step.flops for step in backward] == [2 * 2 * out.numel() * 4 * 9]


def test_composite_operators_below_autograd_count_as_their_parts():
    a = torch.ones(4, 8, device="meta")
    with torch.inference_mode():
        assert [(step.kernel, step.flops) for step in steps(lambda: torch.matmul(a, a.T))] == [("mm", 2 * 4 * 4 * 8)]


def test_seconds_are_the_longer_of_moving_and_computing():
    part = PARTS["a100"]
    assert part.seconds(2.039e12, 0, torch.int64) == pytest.approx(1.0)
    assert part.seconds(1, 624e12, torch.bfloat16) == pytest.approx(2.0)
    assert part.seconds(1, 624e12, torch.float32) == pytest.approx(4.0)
