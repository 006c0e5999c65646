"""Tests of registration_cuda.cpp and its launchers, in a process whose torch pretends to have a GPU.

`test_registration.py` builds the libraries, names them in PRETENDED_LIBRARY and EMULATION_LIBRARY and runs this file.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import emulated
import kernel_cases
import on_device
import pytest
import torch
from kernel_cases import Case

from fastres.kernels import projection, reference
from fastres.kernels.projection import hopper
from fastres.kernels.reference._common import scaled_to_float16
from fastres.numerics import relative_error

LIBRARY = Path(os.environ["PRETENDED_LIBRARY"])
SIZES = [(2, 9, 7, 24, 40, 2), (3, 4, 7, 27, 33, 1), (0, 5, 5, 16, 8, 2)]


@pytest.fixture(scope="session", autouse=True)
def machine():
    """The pretended machine's controls; the extension is its library."""
    emulation = os.environ["EMULATION_LIBRARY"]
    kernels = emulated.Kernels(Path(emulation))  # loaded, and its checks switched on
    projection._FOLDER = LIBRARY.parent
    assert projection.available() is None
    controls = ctypes.CDLL(str(LIBRARY))
    controls.kernels = kernels
    controls.pretended_emulation(emulation.encode())
    controls.pretended_move.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    return controls


@pytest.fixture(autouse=True)
def as_before(machine, monkeypatch):
    monkeypatch.setattr(on_device, "reason", lambda path: None)
    monkeypatch.setattr(on_device, "_there", lambda t: t)
    yield
    machine.pretended_reset()
    assert machine.pretended_current_device() == -1, "the device of before is not the current one again"


CASES = [
    Case(op, size, dtype, path, words, layout)
    for op, path in kernel_cases.OPS
    for i, words in enumerate(kernel_cases.forms(op))
    for size, layout, dtype in zip(
        SIZES,
        ("dense", "view", "dense") if i % 2 else ("view", "unaligned", "view"),
        (torch.bfloat16, torch.float16, torch.bfloat16) if i % 2 else (torch.float16, torch.bfloat16, torch.float16),
        strict=True,
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case):
    case.run(on_device.Kernels())


@pytest.mark.parametrize("path", ["portable", "hopper"])
def test_nan_reaches_what_depends_on_it_and_nothing_else(path):
    kernel_cases.check_nan(on_device.Kernels(), torch.float16, 24, path)


class Arguments:
    def __init__(self, dtype=torch.bfloat16):
        n, h, w, c, k, self.stride = SIZES[0]

        def normal(*size):
            return torch.randn(size, generator=self.generator).to(dtype)

        self.generator = torch.Generator().manual_seed(0)
        self.x, self.dx = normal(n, h, w, c), normal(n, h, w, c)
        size = self.x[:, :: self.stride, :: self.stride].shape[:3]
        self.g, self.out, self.residual = (normal(*size, k) for _ in range(3))
        self.weight, self.u, self.v = normal(k, c), normal(k, c), normal(c, c)
        self.bn, self.k = normal(4, k).float(), normal(c).float()
        self.v_scale, self.d = None, normal(c).float()
        self.hopper = False

    def call(self, op):
        """The op itself, with all it takes."""
        names = {
            "gram": "x stride hopper",
            "fprop": "x weight bn residual relu stride hopper",
            "conv": "x weight stride",
            "wgrad": "g x out with_sum stride hopper",
            "dgrad": "dx g x u v k out relu v_scale d stride hopper",
        }[op]
        flags = {"relu": True, "with_sum": True}
        values = [flags.get(name) or getattr(self, name) for name in names.split()]
        return getattr(torch.ops.fastres_projection, op)(*values)


@pytest.mark.parametrize("path", [projection, hopper], ids=["portable", "hopper"])
def test_launchers_are_the_references(path):
    """In float16 v comes scaled, as `gram_bwd` gives it."""
    t, exact = Arguments(torch.float16), Arguments(torch.float16)
    small = 1e-7 * t.v.float()
    t.v, t.v_scale = scaled_to_float16(small)
    exact.v, exact.v_scale = t.v, t.v_scale
    for name, value in vars(exact).items():
        if isinstance(value, torch.Tensor):
            setattr(exact, name, value.double())

    def run(k, t):
        p, sum_g = k.projection_wgrad(t.g, t.x, 2, t.out)
        assert k.projection_wgrad(t.g, t.x, 2, with_sum=False)[1] is None
        dx = torch.zeros_like(t.dx)
        k.projection_dgrad(dx, t.g, 2**10 * t.x, 0 * t.u, t.v, None, 2, v_scale=t.v_scale)
        dx_all = t.dx.clone()
        k.projection_dgrad(dx_all, t.g, t.x, t.u, t.v, t.k, 2, t.out, relu=True, v_scale=t.v_scale, d=t.d)
        gram, total, pivot = k.projection_gram(t.x, 2)
        # Moments about 0, whatever the pivot.
        rows = t.g.shape[:3].numel()
        total = total + rows * pivot
        gram = gram + torch.outer(pivot, total) + torch.outer(total, pivot) - rows * torch.outer(pivot, pivot)
        return {
            "p": p,
            "sum": sum_g,
            "dx of v alone": dx,
            "dx": dx_all,
            "out": k.projection_fprop(t.x, t.weight, t.bn, 2, t.residual, relu=True),
            "gram": gram,
            "total": total,
        }

    ours, wanted = run(path, t), run(reference, exact)
    assert all(ours[name].isfinite().all() for name in ours)
    errors = {name: relative_error(ours[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < 2**-9, errors
    # What the scaling is for:
    assert relative_error(small.half(), small.double()) > 2**-5


def test_conv_is_a_launcher_too():
    t = Arguments()
    y, stats = projection.projection_conv(t.x, t.weight, 2)
    assert relative_error(y, reference.projection_conv(t.x.double(), t.weight.double(), 2)[0]) < 2**-7
    kernel_cases.check_statistics(y, *stats)
    meta = torch.ops.fastres_projection.conv(t.x.to("meta"), t.weight.to("meta"), 2)
    assert [part.shape for part in meta] == [part.shape for part in (y, *stats)]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e38, 0.0, 1e-40])
def test_any_v_of_float32(value):
    t = Arguments(torch.float16)
    before = t.dx.clone()
    v = torch.zeros(t.v.shape)
    v[3, 5] = value
    v, v_scale = scaled_to_float16(v)
    projection.projection_dgrad(t.dx, t.g, t.x, torch.zeros_like(t.u), v, None, 2, v_scale=v_scale)
    if abs(value) < 1:
        assert torch.equal(t.dx, before)
    else:
        assert not t.dx[:, ::2, ::2, 5].isfinite().any()
        between = torch.ones(t.dx.shape[1:3], dtype=torch.bool)
        between[::2, ::2] = False
        assert torch.equal(t.dx[:, between], before[:, between])


def test_stream_and_guard_are_those_of_the_tensors_device(machine):
    t = Arguments()
    for name, value in vars(t).items():
        if isinstance(value, torch.Tensor):
            machine.pretended_move(value.data_ptr(), 3)
            assert name != "x" or machine.pretended_current_device() == -1
    for op in ("gram", "fprop", "conv", "wgrad", "dgrad"):
        t.call(op)


@pytest.mark.parametrize("op", ["gram", "fprop", "conv", "wgrad", "dgrad"])
def test_what_a_kernel_says_is_raised(machine, op):
    machine.pretended_fail(b"no kernel image is available for execution on the device")
    with pytest.raises(RuntimeError, match=f"^projection_{op}: no kernel image is available"):
        Arguments().call(op)


@pytest.mark.parametrize("chosen", [False, True], ids=["portable", "hopper"])
@pytest.mark.parametrize("op", ["gram", "fprop", "wgrad", "dgrad"])
def test_the_path_is_the_one_that_is_asked_for(machine, op, chosen):
    t = Arguments()
    t.hopper = chosen
    t.call(op)
    assert machine.pretended_calls(chosen) == (2 if op in ("gram", "wgrad") else 1)
    assert machine.pretended_calls(not chosen) == 0


def test_a_dimension_of_one_pixel_does_not_cost_alignment(machine):
    """As in NCHW memory, where its stride is that of the channels."""
    t = Arguments()
    for name in ("x", "dx", "g", "out", "residual"):
        pixel = getattr(t, name)[:, :1, :1]
        setattr(t, name, pixel.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
        assert getattr(t, name).stride()[1:] == (1, 1, 1)
    for op in ("gram", "fprop", "conv", "wgrad", "dgrad"):
        with machine.kernels.options():
            t.call(op)
            assert machine.kernels.counters()["copies"], f"{op} copies elements one by one"


NARROW = torch.zeros(2, 9, 7, 24, 2).bfloat16()[..., 0]
BAD = [
    ("x", torch.zeros(2, 9, 7, 24), "x must be bfloat16 or float16 on CUDA (float32 runs through the library), has fl"),
    (
        "x",
        torch.zeros(2, 9, 7, 24).double(),
        "x must be bfloat16 or float16 on CUDA (float32 runs through",
    ),
    ("x", torch.zeros(2, 9, 7).bfloat16(), "x must be [N, H, W, C], has [2, 9, 7]"),
    ("x", NARROW, "x must be [N, H, W, C] with dense channels (call .contiguous()), has a stride of 2"),
    (
        "x",
        torch.zeros(8).bfloat16().expand(2**16, 2**16, 2, 8),
        "x must be of fewer than 2^31 strided pixels, has 2",
    ),
    ("stride", 0, "stride must be at least 1, has 0"),
    ("weight", torch.zeros(40, 25).bfloat16(), "weight must be [K, C] = [any, 24], has [40, 25]"),
    ("weight", torch.zeros(24, 40).bfloat16().T, "weight must be dense (call .contiguous()), has other strides"),
    ("weight", torch.zeros(40, 24).half(), "weight must be of x's dtype, has another"),
    ("bn", torch.zeros(4, 40).bfloat16(), "bn must be float32, has another dtype"),
    ("residual", torch.zeros(2, 5, 4, 40, 2).bfloat16()[..., 0], "residual must be [N, H, W, C] with dense channels"),
    (
        "residual",
        torch.zeros(2, 5, 4, 41).bfloat16(),
        "residual must be [N, Ho, Wo, K] = [2, 5, 4, 40], has [2, 5,",
    ),
    ("g", torch.zeros(2, 4, 4, 40).bfloat16(), "g must be [N, Ho, Wo, K] = [2, 5, 4, any], has [2, 4, 4, 40]"),
    ("out", torch.zeros(2, 5, 4, 40).half(), "out must be of x's dtype, has another"),
    ("dx", torch.zeros(2, 9, 8, 24).bfloat16(), "dx must be [N, H, W, C] = [2, 9, 7, 24], has [2, 9, 8, 24]"),
    ("dx", torch.zeros(9, 7, 24).bfloat16().expand(2, -1, -1, -1), "dx must be without elements that share memory"),
    ("dx", torch.zeros(999).bfloat16().as_strided((2, 9, 7, 24), (24, 48, 24, 1)), "dx must be without elements that"),
    ("u", torch.zeros(40, 24).float(), "u must be of x's dtype, has another"),
    ("v", torch.zeros(24, 25).bfloat16(), "v must be [C, C] = [24, 24], has [24, 25]"),
    ("k", torch.zeros(24).bfloat16(), "k must be float32, has another dtype"),
    ("d", torch.zeros(24).bfloat16(), "d must be float32, has another dtype"),
    ("d", torch.zeros(25), "d must be [C] = [24], has [25]"),
    ("v_scale", torch.ones(1), "v_scale must be a scalar = [], has [1]"),
    ("v_scale", torch.ones(()).double(), "v_scale must be float32, has another dtype"),
]
OF = {"weight": "fprop conv", "bn": "fprop", "residual": "fprop", "g": "wgrad dgrad", "out": "wgrad dgrad"}
OF |= {"x": "gram fprop conv wgrad dgrad", "stride": "gram fprop conv wgrad dgrad"}


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{name}{i}" for i, (name, _, _) in enumerate(BAD)])
def test_bad_arguments_are_named(name, value, message):
    for op in OF.get(name, "dgrad").split():
        t = Arguments()
        setattr(t, name, value)
        with pytest.raises(RuntimeError) as raised:
            t.call(op)
        assert str(raised.value).startswith(f"projection_{op}: {message}"), str(raised.value)


def test_a_factor_without_v_is_refused():
    t = Arguments()
    t.v, t.v_scale = None, torch.ones(())
    with pytest.raises(RuntimeError, match="^projection_dgrad: v_scale must be None without v, has a value"):
        t.call("dgrad")


@pytest.mark.parametrize("device", [-1, 3])
@pytest.mark.parametrize("op", ["fprop", "wgrad", "dgrad"])
def test_tensors_elsewhere_are_named(machine, op, device):
    names = {"fprop": "weight bn residual", "wgrad": "g out", "dgrad": "dx g u v k out v_scale d"}[op].split()
    for name in names:
        t = Arguments()
        t.v_scale = torch.ones(())
        machine.pretended_move(getattr(t, name).data_ptr(), device)
        with pytest.raises(RuntimeError, match=f"^projection_{op}: {name} must be on x's device, cuda:0, has another"):
            t.call(op)
        machine.pretended_reset()


def test_x_must_be_on_a_gpu(machine):
    t = Arguments()
    machine.pretended_move(t.x.data_ptr(), -1)
    with pytest.raises(RuntimeError, match="^projection_gram: x must be on a CUDA device, has another"):
        t.call("gram")


def test_dx_may_be_a_part_of_a_tensor():
    t = Arguments()
    _, h, w, c = t.dx.shape
    t.x, t.g, t.out = t.x[:1], t.g[:1], t.out[:1]
    whole = torch.zeros(h + 1, w + 2, c + 8).bfloat16()
    t.dx = whole[1:, 2:, 8:].expand(1, h, w, c)  # a stride of 0 between images, of which there is one
    wanted = t.dx.double()
    exact = [a.double() for a in (t.g, t.x, t.u, t.v, t.k)]
    reference.projection_dgrad(wanted, *exact, 2, t.out.double(), relu=True, d=t.d.double())
    t.call("dgrad")
    assert relative_error(t.dx, wanted) < 2**-8
    assert not whole[0].any() and not whole[:, :2].any() and not whole[:, :, :8].any()
