"""Which launchers a plan holds."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from fastres import backends, plan
from fastres.kernels import library, reference

CPU = torch.device("cpu")
PROJECTION = ("projection_gram", "projection_fprop", "projection_wgrad", "projection_dgrad")


@pytest.fixture(autouse=True)
def fresh_plans(monkeypatch):
    monkeypatch.delenv(plan.ENVIRONMENT_VARIABLE, raising=False)
    caches = plan._resolve, plan._resolve_projection
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference", "library"])
def test_a_plan_has_every_kernel(dtype, backend):
    assert set(plan.launchers(plan.resolve(dtype, CPU, backend))) == set(reference.__all__)


def test_namespaces_offer_only_kernels_that_the_reference_defines():
    for name in backends.NAMESPACES[1:]:
        if name == "triton" and backends.reason("triton") is not None:
            continue
        offered = set(backends.load(name).__all__) - {"available", "cuda_available"}
        assert offered <= set(reference.__all__), name


def test_float64_is_always_the_reference():
    assert set(plan.origins(torch.float64, CPU, "library").values()) == {"reference"}
    assert plan.resolve(torch.float32, CPU, "reference").conv2d is reference.conv2d


def test_auto_on_a_cpu_takes_the_library_and_the_extension_where_it_is_faster(monkeypatch):
    reasons = {"triton": "no", "projection": None}
    monkeypatch.setattr(backends, "reason", reasons.get)
    assert plan.resolve(torch.float32, CPU).conv2d is library.conv2d
    origins = plan.origins(torch.float32, CPU)
    assert {origins[name] for name in PROJECTION} == {"projection"}
    assert plan.origins(torch.bfloat16, CPU)["projection_gram"] == "projection"
    assert plan.origins(torch.bfloat16, CPU)["projection_fprop"] == "library"
    reasons["projection"] = "not built"
    plan._resolve.cache_clear()
    assert plan.origins(torch.float32, CPU)["projection_gram"] == "library"


def test_triton_by_name_raises_with_the_reason_where_it_cannot_run(monkeypatch):
    reason = backends.reason("triton")
    if reason is not None:
        with pytest.raises(RuntimeError, match=f"backend='triton' cannot run on this machine: {reason}"):
            plan.resolve(torch.float32, CPU, "triton")
    monkeypatch.setattr(backends, "reason", lambda namespace: None)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        plan.resolve(torch.float32, CPU, "triton")
    with pytest.raises(RuntimeError, match="no float64 kernels"):
        plan.resolve(torch.float64, torch.device("cuda"), "triton")


def test_a_gpu_too_old_for_triton_takes_the_library(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (7, 5))[index])
    backends._triton_reason.cache_clear()
    try:
        assert backends.available()["triton"] == "cuda:1 has compute capability 7.5, the Triton kernels need 8.0"
        assert "triton" not in plan.origins(torch.float16, torch.device("cuda")).values()
        with pytest.raises(RuntimeError, match="backend='triton' cannot run on this machine: cuda:1 has"):
            plan.resolve(torch.float16, torch.device("cuda"), "triton")
    finally:
        backends._triton_reason.cache_clear()


@pytest.mark.parametrize(
    "device, dtype, backend, folded",
    [
        ("cpu", torch.float32, "auto", True),
        ("cpu", torch.bfloat16, "library", True),
        ("meta", torch.bfloat16, "auto", False),
        ("meta", torch.float32, "library", False),
        ("meta", torch.bfloat16, "reference", True),
        ("meta", torch.float64, "auto", True),
    ],
)
def test_blocks_are_stored_on_a_gpu_where_expand_takes_several_passes(device, dtype, backend, folded):
    assert plan.resolve(dtype, torch.device(device), backend).gram_folding is folded


META = torch.device("meta")


@pytest.mark.parametrize(
    "channels, outputs, stride, images, dtype, backend, folded",
    [
        (64, 256, 1, 256, torch.bfloat16, "auto", True),
        (256, 512, 2, 512, torch.float16, "auto", True),
        (256, 512, 1, 512, torch.bfloat16, "auto", False),  # unless the library has to gather pixels
        (64, 256, 1, 64, torch.bfloat16, "auto", False),  # too few pixels to make up for the small matrices
        (512, 1024, 2, 10_000, torch.bfloat16, "auto", False),  # too many channels for mma.sync
        (64, 256, 1, 256, torch.float32, "auto", False),
        (64, 256, 1, 256, torch.bfloat16, "library", False),
        (64, 256, 1, 256, torch.float32, "reference", True),
    ],
)
def test_projections_are_folded_by_the_extension_on_a_gpu_where_that_saves_time(
    channels, outputs, stride, images, dtype, backend, folded
):
    x = torch.empty(images, 56, 56, channels, dtype=dtype, device="meta")
    k = plan.resolve_projection(x, (images, 56 // stride, 56 // stride, outputs), backend)
    assert k.gram_folding is folded
    origin = "reference" if backend == "reference" else "projection" if folded else "library"
    assert {plan.origin(getattr(k, name)) for name in PROJECTION} == {origin}
    assert plan.origin(k.conv1x1) == ("reference" if backend == "reference" else "library")
    assert set(plan.launchers(k)) == set(reference.__all__)


def test_what_folding_a_projection_saves():
    """The figures of docs/arithmetic.md, in seconds: those of ResNet-50's first three layers at a batch of 256."""
    pixels = 256 * 56 * 56
    layers = (pixels, 64, 256, False), (pixels // 4, 256, 512, True), (pixels // 16, 512, 1024, True)
    assert [round(plan.seconds_saved_by_folding(*layer) * 1e3, 2) for layer in layers] == [0.37, -0.05, -0.27]


def test_a_gpu_without_the_extensions_cuda_part_keeps_the_librarys_projection(monkeypatch):
    x = SimpleNamespace(shape=(256, 56, 56, 64), dtype=torch.bfloat16, device=torch.device("cuda"))
    reasons = {"triton": "no", "projection": None}
    monkeypatch.setattr(backends, "reason", reasons.get)
    extension = backends.load("projection")
    table = ((None, None, True), (None, "no nvcc", False), ("not built", None, False))
    for library_reason, cuda_reason, folded in table:
        reasons["projection"] = library_reason
        monkeypatch.setattr(extension, "cuda_available", lambda reason=cuda_reason: reason)
        assert plan.resolve_projection(x, (256, 56, 56, 256)).gram_folding is folded


def test_a_projection_on_a_cpu_has_the_plan_of_blocks():
    x = torch.empty(1, 2, 2, 64)
    assert plan.resolve_projection(x, (1, 2, 2, 256)) is plan.resolve(torch.float32, CPU)


def test_the_environment_overrides_the_argument(monkeypatch):
    monkeypatch.setenv(plan.ENVIRONMENT_VARIABLE, "reference")
    assert plan.resolve(torch.float32, CPU, "library").conv2d is reference.conv2d
    monkeypatch.setenv(plan.ENVIRONMENT_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match="backend='cudnn' is not known; use one of 'auto'"):
        plan.resolve(torch.float32, CPU)


def test_the_meta_device_stands_for_a_gpu():
    expected = "library" if importlib.util.find_spec("triton") is None else "triton"
    assert plan.origins(torch.bfloat16, META)["bn_act"] == expected
    assert plan.origins(torch.bfloat16, META, "library")["bn_act"] == "library"
    assert set(plan.origins(torch.float64, META).values()) == {"reference"}
