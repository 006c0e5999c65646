"""3x3 convolutions: Triton's kernels against the reference, and the boxes that they work in."""

from __future__ import annotations

import pytest
import torch

from fastres import cases, static_checks
from fastres.kernels import reference

CASES = {case.name: case for case in cases.BY_FAMILY["conv3x3"] if "groups" not in case.name}  # those are the library's
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
# Maps of ResNets (56 cropped) and odd ones, whole boxes and ragged ones; channels that TMA takes, and some that it
# does not.
SHAPES = [(1, 7, 7, 24, 80), (3, 14, 7, 16, 24), (1, 15, 14, 80, 24), (1, 56, 3, 8, 16), (3, 1, 2, 36, 4)]


def sizes(shape):
    return dict(zip("nhwck", shape, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_computes_what_the_reference_defines(name, dtype, shape, compare, poisoned):
    compare(CASES[name], dtype, sizes(shape))


@pytest.mark.parametrize("name", ["conv3x3, stride 2", "conv3x3, plain, stride 2"])
def test_strided_boxes_that_reach_over_the_edge(name, compare, poisoned):
    """By TMA, which takes even sizes, and channels that fill a load."""
    compare(CASES[name], torch.float16, sizes((3, 6, 14, 64, 64)))


@pytest.mark.parametrize("wanted", static_checks.requests("conv3x3"), ids=str)
def test_every_configuration_compiles_and_computes_what_the_reference_defines(wanted, check_configuration):
    check_configuration("conv3x3", wanted)


def test_weights_in_any_memory_format(k, device):
    f = cases.Maker(torch.float16, device)
    x, weight, dy = f.activation(1, 4, 6, 16), f.weight(24, 16, 3, 3), f.activation(1, 4, 6, 24)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    other = weight.contiguous()
    assert torch.equal(k.conv3x3(x, weight)[0], k.conv3x3(x, other)[0])
    assert torch.equal(k.conv3x3_dgrad(dy, weight, (4, 6))[0], k.conv3x3_dgrad(dy, other, (4, 6))[0])


@pytest.mark.parametrize("stride", [1, 2])
def test_nothing_leaks_from_outside_of_an_image(stride, k, device):
    """With x = 0 and a shift of 1 the activation is 1 inside of the image, and padding is not relu(shift)."""
    bn = torch.tensor([[0.0], [1.0], [1.0], [1.0]], device=device).repeat(1, 64)
    x = torch.zeros(3, 5, 6, 64, dtype=torch.float16, device=device)
    dy = torch.ones(3, -(-5 // stride), 6 // stride, 64, dtype=torch.float16, device=device)
    expected = reference.conv3x3_wgrad(x, dy, stride, bn=bn)
    assert torch.equal(k.conv3x3_wgrad(x, dy, stride, bn=bn), expected)


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 4), (2, 2, 1)])
def test_what_triton_has_not_is_the_librarys_with_tritons_passes(stride, dilation, groups, k, device, launched):
    f = cases.Maker(torch.float16, device)
    x, weight = f.activation(2, 6, 6, 16), f.weight(8, 16 // groups, 3, 3)
    y, stats = k.conv3x3(x, weight, stride, dilation, groups)
    k.conv3x3_dgrad(f.activation(*y.shape), weight, (6, 6), stride, dilation, groups, y=x, bn=f.bn(x))
    k.conv3x3_wgrad(x, f.activation(*y.shape), stride, dilation, groups, f.bn(x))
    assert [name for name, _ in launched] == ["_channel_stats_kernel", "_bn_bwd_reduce_kernel", "_bn_act_kernel"]


def test_bad_input_names_the_argument_and_the_remedy(k, device):
    f = cases.Maker(torch.float16, device)
    x, dy, weight = f.activation(2, 4, 6, 24), f.activation(2, 4, 6, 16), f.weight(16, 24, 3, 3)

    def raises(kernel, message, *args, error=ValueError, **kwargs):
        with pytest.raises(error, match=f"{kernel}: {message}"):
            getattr(k, kernel)(*args, **kwargs)

    raises("conv3x3", "x is torch.float64.*backend='reference'", x.double(), weight, error=TypeError)
    raises("conv3x3", r"x must be dense.*pass x.contiguous\(\)", x.transpose(1, 2), weight)
    raises("conv3x3", r"weight must be torch.float16 \[16, 24, 3, 3\]", x, weight[..., :1])
    raises("conv3x3", r"weight must be torch.float16 .* is torch.float32", x, weight.float())
    raises("conv3x3_dgrad", r"weight must be torch.float16 \[24, 24, 3, 3\]", x, weight, (4, 6))
    raises("conv3x3_dgrad", r"dy must be .* \[2, 5, 6, channels\] on .*, the pixels of dx", dy, weight, (5, 6))
    raises("conv3x3_dgrad", r"residual must be dense float16 \[2, 4, 6, 24\]", dy, weight, (4, 6), residual=dy)
    raises("conv3x3_dgrad", r"bn must be dense float32 \[4, 24\]", dy, weight, (4, 6), y=x, bn=f.bn(dy))
    raises("conv3x3_dgrad", "y and bn describe one batch norm: pass both, or neither", dy, weight, (4, 6), bn=f.bn(x))
    both = {"y": x, "bn": f.bn(x), "residual": x}
    raises("conv3x3_dgrad", "residual and mask are not for a gradient in front of bn", dy, weight, (4, 6), **both)
    raises("conv3x3_wgrad", r"dy must be .* \[2, 2, 3, channels\] .*, the pixels of x at stride 2", x, dy, 2)
    raises("conv3x3_wgrad", r"bn must be dense float32 \[4, 24\]", x, dy, bn=f.bn(dy))


class TestBoxes:
    @pytest.fixture(autouse=True)
    def boxes(self, triton_kernels):
        from fastres.kernels.triton import _boxes

        self.choose, self.Box = _boxes.choose_box, _boxes.Box

    def test_resnets_maps_are_covered_exactly(self):
        found = {size: self.choose(256, 256, size, size) for size in (56, 28, 14, 7)}
        assert found == {56: (4, 8, 8), 28: (16, 4, 4), 14: (64, 2, 2), 7: (256, 1, 1)}
        assert all(box.tiles(256, size, size) * 256 == 256 * size * size for size, box in found.items())

    def test_few_images_take_fewer_boxes(self):
        box = self.choose(256, 8, 7, 7)
        assert box.tiles(8, 7, 7) == 2  # of 64 pixels for each image's 49

    def test_a_somewhat_smaller_batch_keeps_its_box(self):
        for size in (56, 28, 14, 7):
            # 143 images are the last of ImageNet's in batches of 256.
            assert len({self.choose(256, n, size, size) for n in (256, 241, 143)}) == 1

    def test_parts_are_boxes_in_the_order_of_their_pixels(self):
        assert self.Box(4, 8, 8).part(4) == (1, 8, 8)
        assert self.Box(1, 2, 64).part(4) == (1, 1, 32)
        assert self.Box(2, 8, 8).part(1) == (2, 8, 8)


def test_splits_leave_few_programs_idle(triton_kernels):
    from importlib import import_module

    splits = import_module("fastres.kernels.triton.conv3x3")._splits
    assert splits(5000, 1, 132) == 120
    assert splits(5000, 18, 132) == 7
    assert splits(5000, 72, 132) == 5  # 360 programs in 3 rounds
    assert splits(3, 1, 132) == 3
