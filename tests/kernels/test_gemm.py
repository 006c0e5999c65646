"""What all Triton GEMMs share: tiles and their choice, memory around operands, NaN, and errors."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from fastres import cases, plan
from fastres.kernels import reference

pytest.importorskip("triton", reason="triton is not installed")

FAMILIES = ("conv1x1", "conv3x3", "expand", "gram")
CASES = {case.name: case for name in FAMILIES for case in cases.BY_FAMILY[name] if set(case.kernels) <= {*plan.BY_COST}}
for form in ("", ", plain"):
    del CASES[f"conv3x3{form}, groups 4"]  # the library's
ODD, ROUND = {"n": 3, "h": 7, "w": 5, "k": 3, "c": 33, "s": 5}, {"n": 1, "h": 10, "w": 8, "k": 24, "c": 96, "s": 40}
"""Sizes that TMA does not take, and some that it does."""


def inputs(name, device, sizes):
    case = CASES[name]
    if name == "gram":
        sizes = sizes | {"k": sizes["k"] + 128}  # several blocks
    if case not in cases.BY_FAMILY["expand"]:
        sizes = {size: value for size, value in sizes.items() if size != "s"}
    return case.make(cases.Maker(torch.float16, device), **sizes)


PAD = 64  # elements, which keep the alignment that TMA needs
SENTINEL = 1024


def fenced(t, fence):
    """A copy of t inside of a larger buffer that is full of `fence`, and that buffer."""
    buffer = torch.full((t.numel() + 2 * PAD,), fence, dtype=t.dtype, device=t.device)
    inner = buffer.as_strided(t.shape, t.stride(), PAD)
    inner.copy_(t)
    return inner, buffer


@pytest.mark.parametrize("sizes", [ODD, ROUND], ids=["by pointers", "by TMA"])
@pytest.mark.parametrize("name", CASES)
def test_memory_around_operands_is_neither_used_nor_written(name, sizes, k, device, monkeypatch):
    """And a second run gives the same bits, and leaves inputs that are not results as they are."""
    before = inputs(name, device, sizes)
    expected = CASES[name].run(k, cases.copied(before))
    fences = []

    def fence(make):
        def made(*args, **kwargs):
            inner, buffer = fenced(make(*args, **kwargs).fill_(SENTINEL), SENTINEL)
            fences.append((buffer, inner.numel(), False))
            return inner

        return made

    t = {}
    for key, value in before.items():
        t[key] = value
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            t[key], buffer = fenced(value, torch.nan)
            fences.append((buffer, value.numel(), True))
    for function in ("empty", "empty_like"):
        monkeypatch.setattr(torch, function, fence(getattr(torch, function)))
    found = CASES[name].run(k, t)
    monkeypatch.undo()
    for result in expected:
        assert torch.equal(found[result], expected[result]), result
    for buffer, size, of_input in fences:
        around = torch.cat([buffer[:PAD], buffer[PAD + size :]])
        assert (around.isnan() if of_input else around == SENTINEL).all()
    # The gradient takes the residual's memory, but for 3x3 convolutions.
    for key in before.keys() - (set() if name.startswith("conv3x3") else {"residual"}):
        if isinstance(before[key], torch.Tensor):
            assert torch.equal(t[key], before[key]), key


@pytest.mark.parametrize("name", CASES)
def test_nan_comes_out_where_the_reference_has_it(name, k, device):
    operands = [key for key, value in inputs(name, device, ROUND).items() if isinstance(value, torch.Tensor)]
    assert operands
    for operand in operands:
        t = inputs(name, device, ROUND)
        if t[operand].dim() == 0:
            continue
        if operand == "weight" and t[operand].dim() == 4:
            continue  # Whether padding times NaN is NaN is the library's affair.
        at = tuple(size // 2 for size in t[operand].shape)
        t[operand][at] = torch.nan
        expected, ours = CASES[name].run(reference, cases.copied(t)), CASES[name].run(k, cases.copied(t))
        for result, value in expected.items():
            assert torch.equal(ours[result].isnan(), value.isnan()), (operand, result)


@pytest.mark.parametrize("mean", [10.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gram_keeps_a_variance_far_below_the_mean(dtype, mean, compare, device):
    """As the reference does in the same dtype; in 16 bits a mean of a thousand has rounded the deviations away."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    if dtype != torch.float32 and mean > 10:
        pytest.skip("nothing is left of the deviations")

    case = cases.BY_NAME["gram"]

    def make(f, **sizes):
        t = case.make(f, **sizes)
        t["bn"][3] += mean  # beta, so that a is at about mean +- 1
        return t

    compare(SimpleNamespace(make=make, run=case.run), dtype, {"n": 2, "h": 16, "w": 12, "k": 24, "c": 8})


class TestChoice:
    """Of tiles: `choose` with launches that fail as a GPU does."""

    PREFERRED, BEHIND = "preferred", "behind"

    @pytest.fixture
    def tried(self, triton_kernels, monkeypatch):
        from fastres.kernels.triton import _gemm

        monkeypatch.setattr(_gemm, "_rejected", set())
        tried, outcome = [], {}

        def launch(tile):
            tried.append(tile)
            return outcome[tile]()

        def choose(form="form", dtype=torch.float16, tiles=(self.PREFERRED, self.BEHIND)):
            return _gemm.choose(form, tiles, torch.empty(0, dtype=dtype), launch)

        return SimpleNamespace(tiles=tried, outcome=outcome, choose=choose)

    @staticmethod
    def gives(result, spills=0):
        return lambda: (result, SimpleNamespace(n_spills=spills))

    @staticmethod
    def does_not_fit():
        from triton.runtime.errors import OutOfResources

        raise OutOfResources(300_000, 232_448, "shared memory")

    def test_the_preferred_tile_where_it_fits(self, tried):
        tried.outcome |= {self.PREFERRED: self.gives(1)}
        assert (tried.choose(), tried.choose(), tried.tiles) == (1, 1, [self.PREFERRED] * 2)

    def test_a_tile_that_does_not_fit_is_tried_once(self, tried):
        tried.outcome |= {self.PREFERRED: self.does_not_fit, self.BEHIND: self.gives(2)}
        assert (tried.choose(), tried.choose()) == (2, 2)
        assert tried.tiles == [self.PREFERRED, self.BEHIND, self.BEHIND]
        tried.choose(dtype=torch.float32)
        tried.choose("another form")
        assert tried.tiles[3:] == [self.PREFERRED, self.BEHIND] * 2

    def test_a_tile_that_spills_serves_once(self, tried):
        tried.outcome |= {self.PREFERRED: self.gives(1, spills=8), self.BEHIND: self.gives(2, spills=8)}
        assert (tried.choose(), tried.choose(), tried.choose()) == (1, 2, 2)

    def test_where_no_tile_fits_triton_says_so(self, tried):
        from triton.runtime.errors import OutOfResources

        tried.outcome |= {self.PREFERRED: self.does_not_fit, self.BEHIND: self.does_not_fit}
        for _ in range(2):
            with pytest.raises(OutOfResources, match="shared memory"):
                tried.choose()


def test_tiles_by_width_dtype_and_part(triton_kernels, monkeypatch):
    from fastres.kernels.triton import _common, _gemm

    conv1x1 = importlib.import_module("fastres.kernels.triton.conv1x1")
    like, form = torch.empty(0, dtype=torch.bfloat16), "conv1x1"

    def choices(channels, tma=True, like=like):
        return _gemm.choices(conv1x1.CONFIGS, form, like, channels, tma)

    for part in (80, 90, 100):
        monkeypatch.setattr(_common, "PART_WITHOUT_GPU", part)
        narrow, wide = conv1x1.CONFIGS[part][form].values()
        assert [choices(channels) for channels in (1, 64, 65, 128, 2048)] == [narrow, narrow, wide, wide, wide]
        assert choices(64, tma=False) == conv1x1.CONFIGS[80][form][64]
        assert choices(64, like=torch.empty(0)) == _gemm.FLOAT32


def test_every_kernel_has_a_tile_behind_the_preferred_one(triton_kernels):
    from fastres.kernels.triton import _common, _gemm

    for name in FAMILIES:
        module = importlib.import_module(f"fastres.kernels.triton.{name}")
        assert module.CONFIGS.keys() == _common.MULTIPROCESSORS.keys()
        for forms in module.CONFIGS.values():
            assert all(len(choices) == 2 for widths in forms.values() for choices in widths.values())
    assert len(_gemm.FLOAT32) == 2


@pytest.mark.parametrize(
    "steps, tiles, programs, least, splits",
    [(100, 4, 132, 1, 33), (10, 4, 132, 1, 10), (100, 200, 132, 1, 1), (0, 4, 132, 1, 1), (1000, 200, 132, 7, 7)],
)
def test_splits_fill_the_gpu_as_far_as_there_is_work(steps, tiles, programs, least, splits, triton_kernels):
    from fastres.kernels.triton import _gemm

    assert _gemm.split_count(steps, tiles, programs, least) == splits


def test_bad_input_names_the_argument_and_the_remedy(k, device):
    f = cases.Maker(torch.float16, device)
    x, g, weight = f.activation(2, 4, 6, 24), f.activation(2, 4, 6, 16), f.weight(16, 24)
    bn_x, bn_g, grad = f.bn(x), f.bn(g), f.bn(g)
    dense = "must be dense float16"

    def raises(kernel, message, *args, error=ValueError, **kwargs):
        with pytest.raises(error, match=f"{kernel}: {message}"):
            getattr(k, kernel)(*args, **kwargs)

    raises("conv1x1", "x is torch.float64.*backend='reference'", x.double(), weight, error=TypeError)
    raises("conv1x1", r"x must be dense.*pass x.contiguous\(\)", x.transpose(1, 2), weight)
    raises("conv1x1", rf"weight {dense} \[16, 24\]", x, weight[:, :8])
    raises("conv1x1", rf"weight {dense}.* is torch.float32", x, weight.float())
    raises("conv1x1", r"bn must be dense float32 \[4, 24\]", x, weight, bn=bn_g)
    raises("conv1x1_dgrad", rf"weight {dense} \[16, 16\]", g, weight.T, (4, 6))
    raises(
        "conv1x1_dgrad", r"y has shape \(1, 4, 6, 16\), must have g's", g, weight, (4, 6), bn=bn_g, grad=grad, y=g[:1]
    )
    raises("conv1x1_dgrad", "y and grad belong to bn: pass it too, or neither", g, weight, (4, 6), y=g, grad=grad)
    raises("conv1x1_dgrad", rf"residual {dense} \[2, 4, 6, 24\]", g, weight, (4, 6), residual=x[:1])
    raises("conv1x1_dgrad", rf"mask {dense} \[2, 8, 12, 24\]", g, weight, (8, 12), 2, mask=x)
    raises("conv1x1_dgrad", r"g must be torch.float16 \[2, 5, 6, channels\] on .*, the pixels of dx", g, weight, (5, 6))
    raises("conv1x1_wgrad", r"g must be torch.float16 \[2, 2, 3, channels\] .*, the pixels of x at stride 2", x, g, 2)
    raises("conv1x1_bwd", rf"residual {dense} \[2, 4, 6, 24\]", x, g, weight, residual=g)
    expand = {"bn": bn_g, "weight": f.weight(24, 16), "out_bn": bn_x}
    raises("expand", r"shortcut has shape \(2, 4, 6, 16\), must have out's", g, shortcut=g, **expand)
    raises("expand", r"out_bn must be dense float32 \[4, 24\]", g, shortcut=x, **(expand | {"out_bn": bn_g}))
    raises("expand", rf"weight {dense} \[24, 16\]", g, shortcut=x, **(expand | {"weight": weight.T}))
    project = {"shortcut": x, "shortcut_weight": f.weight(24, 24)}
    raises("expand", "shortcut_weight needs shortcut_bn: pass both, or neither", g, **expand, **project)
    project["shortcut_bn"] = bn_x
    raises(
        "expand",
        r"y must be .* \[2, 2, 3, channels\] .* pixels of shortcut at stride 2",
        g,
        stride=2,
        **expand,
        **project,
    )
    raises("expand_wgrad", r"out has shape \(2, 4, 6, 16\), must have g's", x, g, g, bn_g)
    raises("expand_wgrad", r"bn must be dense float32 \[4, 16\]", x, x, g, bn_x)
    raises("expand_wgrad", r"g must be .* pixels of x at stride 2", x, x, g, bn_g, x=x, stride=2)
    u, vector = f.weight(24, 16), f.vector(16)
    raises("expand_dgrad", rf"u {dense} \[24, 16\]", x, weight, None, None, g, bn_g)
    raises("expand_dgrad", rf"v {dense} \[16, 16\]", x, u, u, vector, g, bn_g)
    raises("expand_dgrad", r"k must be dense float32 \[16\]", x, u, f.weight(16, 16), f.vector(24), g, bn_g)
    raises("expand_dgrad", r"d must be dense float32 \[16\]", x, u, f.weight(16, 16), vector, g, bn_g, d=f.vector(24))
    raises("expand_dgrad", "k, d and v_scale belong to v: pass it too", x, u, None, vector, g, bn_g)
    raises("gram", r"bn must be dense float32 \[4, 16\]", g, bn_x)
    moments = k.gram(g, bn_g)
    state = (None,) * 5
    finalize = 48, f.weight(24, 16), *state, 0.1, 1e-5
    raises(
        "gram_finalize",
        r"moments.gram must be dense float32 \[16, 16\]",
        moments._replace(gram=moments.gram[:8]),
        *finalize,
    )
    raises(
        "gram_finalize", r"moments.pivot must be dense float32 \[16\]", moments._replace(pivot=f.vector(8)), *finalize
    )
    p = torch.zeros(24, 16, device=device)
    raises("gram_bwd", r"p must be float32 \[24, 16\]", p.T, f.vector(24), f.weight(24, 16), bn_x, 48)
    raises("gram_bwd", r"sum_g must be dense float32 \[24\]", p, f.vector(16), f.weight(24, 16), bn_x, 48)
