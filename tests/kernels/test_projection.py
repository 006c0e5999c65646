"""The projection extension against its definition in float64, and against the reference kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastres.kernels import projection, reference
from fastres.kernels.projection import hopper
from fastres.kernels.reference._common import acc_dtype
from fastres.numerics import assert_sums, assert_three_way, relative_error, unit_roundoff

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# n, h, w, c, k: channels of no tile's size, single pixels, sizes that the stride does not divide, an empty batch.
SHAPES = [
    (2, 7, 9, 1, 5),
    (3, 5, 8, 3, 64),
    (1, 12, 7, 24, 27),
    (2, 13, 11, 27, 1),
    (3, 9, 9, 64, 130),
    (1, 1, 1, 24, 48),
    (1, 1, 6, 64, 3),
    (0, 5, 5, 3, 4),
    (1, 40, 31, 3, 97),
    (1, 6, 5, 130, 33),
]
needs_library = pytest.mark.skipif(projection.available() is not None, reason=str(projection.available()))


class Inputs:
    """Arguments of all four kernels; the sums' terms have mixed signs and the channels different scales."""

    def __init__(self, dtype, shape, stride, mean=0.0):
        n, h, w, c, k = shape
        generator = torch.Generator().manual_seed(hash((shape, stride)) % 2**31)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        spread = torch.logspace(-1, 1, c, dtype=torch.float64)
        self.stride = stride
        self.x = (mean + spread * normal(n, h, w, c)).to(dtype)
        self.g, self.residual, self.out = (
            normal(*self.x[:, ::stride, ::stride].shape[:3], k).to(dtype) for _ in range(3)
        )
        self.out = self.out.relu()
        self.weight = normal(k, c).to(dtype)
        self.bn = normal(4, k).to(acc_dtype(dtype))
        self.dx = normal(n, h, w, c).to(dtype)
        self.u, self.v = normal(k, c).to(dtype), normal(c, c).to(dtype)
        self.k, self.d = (normal(c).to(acc_dtype(dtype)) for _ in range(2))


def xs(t):
    """The strided pixels as rows, float64."""
    return rows(t.x[:, :: t.stride, :: t.stride])


def rows(t):
    """`[N, H, W, C]` as rows, float64."""
    return t.double().flatten(0, 2)


def masked(g, z):
    """g where a ReLU lets z pass."""
    return g.masked_fill(z <= 0, 0)


@pytest.fixture
def poisoned():
    """New tensors are full of NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@needs_library
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("stride", [1, 2, 3], ids="stride{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestDefinition:
    def test_gram(self, dtype, shape, stride):
        t = Inputs(dtype, shape, stride, mean=5.0)
        moments = projection.projection_gram(t.x, stride)
        assert {m.dtype for m in moments} == {acc_dtype(dtype)}
        rows = xs(t)
        if len(rows):
            assert_sums(moments.pivot, rows[:64].mean(0), rows[:64].abs().mean(0), 64)
        else:
            assert (moments.pivot == 0).all()
        centred = rows - moments.pivot.double()
        assert_sums(moments.gram, centred.T @ centred, centred.abs().T @ centred.abs(), len(rows))
        assert_sums(moments.total, centred.sum(0), centred.abs().sum(0), len(rows))
        assert torch.equal(moments.gram, moments.gram.T)

    @pytest.mark.parametrize("with_residual, relu", [(False, False), (False, True), (True, True)])
    def test_fprop(self, dtype, shape, stride, with_residual, relu):
        t = Inputs(dtype, shape, stride)
        out = projection.projection_fprop(t.x, t.weight, t.bn, stride, t.residual if with_residual else None, relu)
        assert out.dtype == dtype and out.shape == t.g.shape and out.is_contiguous()
        scale, shift = t.bn[2].double(), t.bn[3].double()
        exact = xs(t) @ t.weight.double().T * scale + shift
        magnitudes = xs(t).abs() @ t.weight.double().abs().T * scale.abs() + shift.abs()
        if with_residual:
            exact, magnitudes = exact + rows(t.residual), magnitudes + rows(t.residual).abs()
        assert_sums(out.flatten(0, 2), exact.relu() if relu else exact, magnitudes, shape[3])
        if relu:
            assert (out >= 0).all()

    @pytest.mark.parametrize("with_out", [True, False])
    def test_wgrad(self, dtype, shape, stride, with_out):
        t = Inputs(dtype, shape, stride)
        out = t.out if with_out else None
        p, total = projection.projection_wgrad(t.g, t.x, stride, out)
        assert p.dtype == total.dtype == acc_dtype(dtype)
        g = masked(rows(t.g), rows(t.out)) if with_out else rows(t.g)
        assert_sums(p, g.T @ xs(t), g.abs().T @ xs(t).abs(), len(g))
        assert_sums(total, g.sum(0), g.abs().sum(0), len(g))
        same, nothing = projection.projection_wgrad(t.g, t.x, stride, out, with_sum=False)
        assert torch.equal(same, p) and nothing is None

    @pytest.mark.parametrize("given", ["", "v", "k relu", "v out", "v k d", "v k d out relu"])
    def test_dgrad(self, dtype, shape, stride, given):
        t = Inputs(dtype, shape, stride)
        with_v, with_k, with_out, relu = (name in given.split() for name in ("v", "k", "out", "relu"))
        d = t.d if "d" in given.split() else None
        before = t.dx.clone()
        g = masked(rows(t.g), rows(t.out)) if with_out else rows(t.g)
        added, magnitudes = g @ t.u.double(), g.abs() @ t.u.double().abs()
        if with_v:
            added, magnitudes = added + xs(t) @ t.v.double(), magnitudes + xs(t).abs() @ t.v.double().abs()
        if with_k:
            added, magnitudes = added + t.k.double(), magnitudes + t.k.double().abs()
        if d is not None:
            added, magnitudes = added + d.double() * xs(t), magnitudes + (d.double() * xs(t)).abs()
        v, k, out = t.v if with_v else None, t.k if with_k else None, t.out if with_out else None
        projection.projection_dgrad(t.dx, t.g, t.x, t.u, v, k, stride, out, relu, d=d)
        strided = rows(before[:, ::stride, ::stride])
        ours = t.dx[:, ::stride, ::stride].flatten(0, 2)
        exact, magnitudes = strided + added, strided.abs() + magnitudes
        if relu:
            exact, magnitudes = masked(exact, xs(t)), masked(magnitudes, xs(t))
        assert_sums(ours, exact, magnitudes, shape[3] + shape[4] + 1)
        between = torch.ones(t.dx.shape[1:3], dtype=torch.bool)
        between[::stride, ::stride] = False
        assert torch.equal(t.dx[:, between], before[:, between])


@needs_library
@pytest.mark.parametrize("shape", [(2, 15, 14, 64, 128), (4, 9, 9, 24, 27)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_the_reference(dtype, shape):
    t, exact = Inputs(dtype, shape, 2, mean=1.0), Inputs(dtype, shape, 2, mean=1.0)
    for name, value in vars(exact).items():
        if isinstance(value, torch.Tensor):
            setattr(exact, name, value.double())

    def run(k, t):
        dx = t.dx.clone()
        k.projection_dgrad(dx, t.g, t.x, t.u, t.v, t.k, 2, t.out, relu=True)
        p, sum_g = k.projection_wgrad(t.g, t.x, 2, t.out)
        count = t.g.shape[:3].numel()
        moments = k.projection_gram(t.x, 2)
        bn, mean, scatter = reference.gram_finalize(moments, count, t.weight, *[None] * 6, eps=1e-5)
        return {
            "out": k.projection_fprop(t.x, t.weight, t.bn, 2, t.residual, relu=True),
            "p": p,
            "sum_g": sum_g,
            "dx": dx,
            "bn": bn,
            "mean": mean,
            "scatter": scatter,
        }

    ours, stock, truth = run(projection, t), run(reference, t), run(reference, exact)
    for name in truth:
        assert ours[name].dtype == stock[name].dtype
        assert_three_way(name, ours[name], stock[name], truth[name], dtype)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram_keeps_the_variance_at_a_mean_of_a_thousand_standard_deviations(dtype):
    x = (1000 + torch.randn(4, 30, 30, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    rows = x[:, ::2, ::2].double().flatten(0, 2)
    gram, total, pivot = projection.projection_gram(x, 2)
    count = len(rows)
    mean, covariance = pivot + total / count, gram / count - torch.outer(total, total) / count**2
    assert relative_error(mean, rows.mean(0)) < 4 * unit_roundoff(dtype)
    assert relative_error(covariance, torch.cov(rows.T, correction=0)) < 32 * unit_roundoff(dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    def results():
        t = Inputs(dtype, (8, 41, 40, 64, 100), 2)  # 3360 rows: sums are split
        projection.projection_dgrad(t.dx, t.g, t.x, t.u, t.v, t.k, 2, t.out, relu=True)
        return [
            t.dx,
            *projection.projection_gram(t.x, 2),
            *projection.projection_wgrad(t.g, t.x, 2, t.out),
            projection.projection_fprop(t.x, t.weight, t.bn, 2, t.residual, relu=True),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results()
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, results())), count
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_what_depends_on_it_and_nothing_else(dtype):
    t = Inputs(dtype, (2, 6, 5, 27, 40), 2)
    t.x[1, 1, 1] = float("nan")  # a pixel between the strided ones
    t.x[0, 2, 4, 13] = float("nan")
    gram, total, pivot = projection.projection_gram(t.x, 2)
    assert gram[13].isnan().all() and gram[:, 13].isnan().all() and total[13].isnan() and pivot[13].isnan()
    others = torch.arange(27) != 13
    assert gram[others][:, others].isfinite().all() and total[others].isfinite().all()
    for relu in (False, True):
        out = projection.projection_fprop(t.x, t.weight, t.bn, 2, relu=relu)
        assert out[0, 1, 2].isnan().all() and out.isnan().sum() == 40
    p, total = projection.projection_wgrad(t.g, t.x, 2)
    assert p[:, 13].isnan().all() and p.isnan().sum() == 40 and total.isfinite().all()
    projection.projection_dgrad(t.dx, t.g, t.x, t.u, t.v, t.k, 2)
    assert t.dx[0, 2, 4].isnan().all() and t.dx.isnan().sum() == 27


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_pytorchs(dtype):
    """What is NaN passes, -0 does not; a masked NaN is gone."""
    t = Inputs(dtype, (1, 1, 4, 3, 2), 1)
    nan = float("nan")
    t.g[0, 0, :, 0] = torch.tensor([nan, nan, 1.0, 1.0])
    t.out[0, 0, :, 0] = torch.tensor([0.0, -0.0, nan, -1.0])
    t.out[..., 1] = 1.0
    _, total = projection.projection_wgrad(t.g, t.x, 1, t.out)
    assert total[0] == 1 and total[1].isfinite()

    t.x[0, 0, :, 0] = torch.tensor([nan, -0.0, 0.0, -1.0])
    t.dx[0, 0, 1] = nan
    projection.projection_dgrad(t.dx, t.g, t.x, t.u, None, None, 1, t.out, relu=True)
    assert t.dx[0, 0, 0, 0].isfinite() and (t.dx[0, 0, 1:, 0] == 0).all()
    assert (t.dx[0, 0, :, 0] != 0).tolist() == [True, False, False, False]

    residual = torch.tensor([nan, -0.0, -torch.inf, torch.inf], dtype=dtype).view(1, 1, 4, 1).repeat(1, 1, 1, 2)
    t.bn[2:] = 0
    out = projection.projection_fprop(torch.ones_like(t.x), t.weight, t.bn, 1, residual, relu=True)
    assert torch.equal(out, residual.relu()) or (out.isnan() == residual.isnan()).all()
    assert out[0, 0, 1:, 0].tolist() == [0, 0, torch.inf]


@needs_library
def test_bfloat16_results_are_rounded_as_torch_rounds():
    upper = torch.arange(2**16, dtype=torch.int64)[:, None]
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])  # below, at and above a tie; NaN with any payload
    bits = (upper * 2**16 + lower).flatten()
    values = torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)
    values = values[values.isnan() | ~values.isfinite() | (values.abs() > 2.0**-126)]  # no flushed subnormals
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    bn = torch.stack([values, values, values, torch.full_like(values, -0.0)])
    ours = projection.projection_fprop(one, torch.ones(len(values), 1).bfloat16(), bn, 1).flatten()
    nan = values.isnan()
    assert ours[nan].isnan().all()
    assert torch.equal(ours[~nan].view(torch.int16), values[~nan].bfloat16().view(torch.int16))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    t = Inputs(dtype, (2, 5, 6, 24, 9), 2)
    ops = torch.ops.fastres_projection
    torch.library.opcheck(ops.gram.default, (t.x, 2))
    torch.library.opcheck(ops.fprop.default, (t.x, t.weight, t.bn, None, False, 2))
    torch.library.opcheck(ops.fprop.default, (t.x, t.weight, t.bn, t.residual, True, 2))
    torch.library.opcheck(ops.wgrad.default, (t.g, t.x, None, False, 2))
    torch.library.opcheck(ops.wgrad.default, (t.g, t.x, t.out, True, 2))
    torch.library.opcheck(ops.dgrad.default, (t.dx, t.g, t.x, t.u, None, None, None, False, None, None, 2))
    torch.library.opcheck(ops.dgrad.default, (t.dx, t.g, t.x, t.u, t.v, t.k, t.out, True, None, t.d, 2))


@needs_library
def test_conv_runs_on_cuda_only():
    with pytest.raises(NotImplementedError, match="fastres_projection::conv"):
        projection.projection_conv(torch.zeros(1, 2, 2, 8), torch.zeros(8, 8), 2)


@needs_library
def test_shapes_of_conv():
    x, weight = (torch.zeros(size, dtype=torch.bfloat16, device="meta") for size in ((2, 33, 5, 8), (24, 8)))
    y, stats = projection.projection_conv(x, weight, 2)
    assert y.shape == (2, 17, 3, 24) and y.dtype == torch.bfloat16
    assert stats.count.shape == (1,) and stats.mean.shape == stats.m2.shape == (1, 24)
    assert {part.dtype for part in stats} == {torch.float32}


GOOD = dict(x=(2, 6, 5, 64), weight=(128, 64), bn=(4, 128), g=(2, 3, 3, 128), dx=(2, 6, 5, 64), u=(128, 64), v=(64, 64))
BAD = [
    ("fprop", "weight", torch.zeros(128, 32), r"weight must be \[K, C\] = \[any, 64\], has \[128, 32\]"),
    ("fprop", "weight", torch.zeros(128, 64, 1, 1), r"weight must be \[K, C\] = \[any, 64\], has \[128, 64, 1, 1\]"),
    ("fprop", "weight", torch.zeros(128, 64).bfloat16(), r"weight must be of x's dtype"),
    ("fprop", "weight", torch.zeros(64, 128).T, r"weight must be dense \(call .contiguous\(\)\)"),
    ("fprop", "bn", torch.zeros(4, 64), r"bn must be \[4, K\] = \[4, 128\], has \[4, 64\]"),
    ("fprop", "bn", torch.zeros(4, 128).double(), r"bn must be float32, has another dtype"),
    ("fprop", "residual", torch.zeros(2, 3, 3, 64), r"residual must be \[N, Ho, Wo, K\] = \[2, 3, 3, 128\], has"),
    ("fprop", "x", torch.zeros(2, 6, 64), r"x must be \[N, H, W, C\], has \[2, 6, 64\]"),
    ("fprop", "x", torch.zeros(2, 6, 5, 64).half(), r"x must be float32, float64 or bfloat16 on a CPU"),
    ("fprop", "x", torch.zeros(2, 64, 6, 5).permute(0, 2, 3, 1), r"x must be dense \(call .contiguous"),
    ("fprop", "stride", 0, r"stride must be at least 1, has 0"),
    ("fprop", "hopper", True, r"hopper must be False on a CPU, has True"),
    ("gram", "x", torch.zeros(4, 4), r"x must be \[N, H, W, C\]"),
    ("wgrad", "g", torch.zeros(2, 6, 5, 128), r"g must be \[N, Ho, Wo, K\] = \[2, 3, 3, any\], has \[2, 6, 5, 128\]"),
    ("wgrad", "out", torch.zeros(2, 3, 3, 1), r"out must be \[N, Ho, Wo, K\] = \[2, 3, 3, 128\], has \[2, 3, 3, 1\]"),
    ("wgrad", "out", torch.zeros(2, 3, 3, 128).double(), r"out must be of x's dtype"),
    ("dgrad", "dx", torch.zeros(2, 6, 6, 64), r"dx must be \[N, H, W, C\] = \[2, 6, 5, 64\], has \[2, 6, 6, 64\]"),
    ("dgrad", "dx", torch.zeros(2, 64, 6, 5).permute(0, 2, 3, 1), r"dx must be dense"),
    ("dgrad", "u", torch.zeros(64, 128), r"u must be \[K, C\] = \[128, 64\], has \[64, 128\]"),
    ("dgrad", "v", torch.zeros(32, 32), r"v must be \[C, C\] = \[64, 64\], has \[32, 32\]"),
    ("dgrad", "d", torch.zeros(3), r"d must be \[C\] = \[64\], has \[3\]"),
    ("dgrad", "k", torch.zeros(3), r"k must be \[C\] = \[64\], has \[3\]"),
    ("dgrad", "out", torch.zeros(2, 3, 3, 64), r"out must be \[N, Ho, Wo, K\] = \[2, 3, 3, 128\], has"),
]


@needs_library
@pytest.mark.parametrize(("op", "name", "value", "message"), BAD)
def test_bad_arguments_are_named(op, name, value, message):
    t = {key: torch.zeros(size) for key, size in GOOD.items()} | {"k": torch.zeros(64), "stride": 2, name: value}
    order = {"gram": "x", "fprop": "x weight bn", "wgrad": "g x", "dgrad": "dx g x u v k"}[op]
    function = getattr(projection, f"projection_{op}")
    optional = {key: t[key] for key in ("residual", "out", "hopper", "d") if key in t}
    with pytest.raises(RuntimeError, match=f"^projection_{op}: {message}"):
        function(*[t[key] for key in order.split()], t["stride"], **optional)


@needs_library
def test_a_factor_of_v_is_for_cuda():
    t = Inputs(torch.float32, (1, 2, 2, 8, 8), 2)
    with pytest.raises(RuntimeError, match="^projection_dgrad: v_scale must be None on a CPU, has a value"):
        torch.ops.fastres_projection.dgrad(t.dx, t.g, t.x, t.u, t.v, t.k, None, False, torch.ones(()), None, 2)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_instruction_set(capability):
    """ATEN_CPU_CAPABILITY limits this library as it limits torch; MALLOC_PERTURB_ fills its working memory."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "stride2", f"{__file__}::TestDefinition"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "MALLOC_PERTURB_": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_importing_does_not_load_the_library():
    code = (
        "import torch, fastres.kernels.projection as p\n"
        "assert not hasattr(torch.ops.fastres_projection, 'gram')\n"
        "assert p.available() or hasattr(torch.ops.fastres_projection, 'gram')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BUILT = {"built": True, "reason": None, "library": "lib.so", "torch": "2.11.0"}
BUILT |= {"cuda": None, "cuda_architectures": [], "nvcc": "13.0.88"}


def test_available_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "_FOLDER", tmp_path)
    available = projection.available.__wrapped__
    assert available().startswith("not built: the package was not installed by its setup.py")

    outcome = BUILT | {"built": False, "reason": "no C++ compiler was found", "library": None}
    (tmp_path / "_build.json").write_text(json.dumps(outcome))
    assert available() == "not built: no C++ compiler was found"

    (tmp_path / "_build.json").write_text(json.dumps(BUILT))
    assert "lib.so is missing, install the package again" in available()

    (tmp_path / "lib.so").write_text("no library")
    assert "lib.so, built for torch 2.11.0, does not load in torch" in available()


def test_functions_say_why_the_extension_is_not_available(monkeypatch):
    monkeypatch.setattr(projection, "available", lambda: "not built: no C++ compiler was found")
    with pytest.raises(RuntimeError, match="projection extension is not available: not built: no C"):
        projection.projection_gram(torch.zeros(1, 1, 1, 1), 1)


@pytest.fixture
def on_gpus(monkeypatch):
    """`on_gpus(build, *capabilities)`: `cuda_available()` of a build on a machine with such GPUs."""

    def ask(build, *capabilities):
        monkeypatch.setattr(projection, "available", lambda: None)
        monkeypatch.setattr(projection, "build_outcome", lambda: BUILT | build)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(projection, "_driver_version", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        return projection.cuda_available.__wrapped__()

    return ask


DEFAULT = ["80-real", "90a-real", "100-real", "100-virtual"]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (DEFAULT, (7, 5), False),
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 6), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 0), True),
        (DEFAULT, (10, 3), True),
        (DEFAULT, (12, 0), True),
        (["80-real"], (9, 0), False),
        (["86-real"], (8, 0), False),
        (["90a-real"], (9, 0), True),
        (["90a-virtual"], (10, 0), False),
        (["100f-real"], (10, 3), True),
        (["100f"], (12, 0), False),
        (["80"], (9, 0), True),
        (["80-virtual"], (7, 5), False),
        (["100-real"], (12, 0), False),
    ],
)
def test_which_gpus_an_architecture_serves(on_gpus, architectures, capability, runs):
    reason = on_gpus({"cuda_architectures": architectures}, capability)
    if runs:
        assert reason is None
    else:
        assert reason.startswith(
            f"cuda:0 has compute capability {capability[0]}.{capability[1]}, the kernels are built"
        )


def test_the_hopper_path_is_for_its_own_gpus(on_gpus, monkeypatch):
    for capabilities, reason in (
        ([(9, 0), (9, 0)], None),
        ([(9, 0), (10, 0)], "cuda:1 has compute capability 10.0, TMA and wgmma are used as in 9.0"),
        ([], "torch sees no CUDA device"),
    ):
        portable = on_gpus({"cuda_architectures": DEFAULT}, *capabilities)
        monkeypatch.setattr(hopper, "cuda_available", lambda portable=portable: portable)
        assert hopper.available() == reason


def test_every_gpu_must_be_served(on_gpus):
    assert on_gpus({"cuda_architectures": DEFAULT}, (9, 0), (7, 5)).startswith("cuda:1 has compute capability 7.5")


@pytest.mark.parametrize("driver", [(12, 9), (13, 0), (14, 1)])
def test_the_driver_must_be_as_new_as_nvcc(on_gpus, monkeypatch, driver):
    assert on_gpus({"cuda_architectures": DEFAULT}, (9, 0)) is None  # a driver that does not say
    monkeypatch.setattr(projection, "_driver_version", lambda: driver)
    reason = projection.cuda_available.__wrapped__()
    if driver < (13, 0):
        assert reason.startswith("built by nvcc 13.0.88 for drivers of CUDA 13, this one is of CUDA 12.9: update it")
    else:
        assert reason is None


class Driver:
    def __init__(self, failed=0):
        self.failed = failed

    def cuDriverGetVersion(self, version):
        version._obj.value = 12090
        return self.failed


def test_driver_version(monkeypatch):
    for driver, version in ((Driver(), (12, 9)), (Driver(failed=3), None), (object(), None)):
        monkeypatch.setattr(projection.ctypes, "CDLL", lambda name, driver=driver: driver)
        assert projection._driver_version() == version

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(projection.ctypes, "CDLL", missing)
    assert projection._driver_version() is None


def test_cuda_available_says_why_not(on_gpus, monkeypatch):
    assert on_gpus({"cuda": "nvcc was not found"}, (9, 0)) == "built without its CUDA kernels: nvcc was not found"
    assert on_gpus({}) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert projection.cuda_available.__wrapped__() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(projection, "available", lambda: "not built: no C++ compiler was found")
    assert projection.cuda_available.__wrapped__() == "not built: no C++ compiler was found"


@needs_library
@pytest.mark.parametrize("name", [name for name in hopper.__all__ if name != "available"])
def test_the_hopper_path_has_the_same_functions(name):
    launcher = getattr(hopper, name)
    assert (launcher.__module__, launcher.__name__) == (projection.__name__, name)
    t = Inputs(torch.float32, (1, 2, 2, 8, 8), 2)
    arguments = {
        "projection_gram": (t.x, 2),
        "projection_fprop": (t.x, t.weight, t.bn, 2),
        "projection_wgrad": (t.g, t.x, 2),
        "projection_dgrad": (t.dx, t.g, t.x, t.u, t.v, t.k, 2),
    }
    with pytest.raises(RuntimeError, match=f"^{name}: hopper must be False on a CPU, has True"):
        launcher(*arguments[name])
