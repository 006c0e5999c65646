"""Which launchers a plan holds."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import backends, plan, tuned
from fastres.kernels import library, reference

CPU = torch.device("cpu")
META = torch.device("meta")
PROJECTION = ("projection_gram", "projection_fprop", "projection_wgrad", "projection_dgrad")


@pytest.fixture(autouse=True)
def fresh_plans(monkeypatch):
    monkeypatch.delenv(plan.ENVIRONMENT_VARIABLE, raising=False)
    caches = plan._resolve, plan._resolve_block, plan._resolve_projection
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


BLOCK = {"first": 64, "last": (64, 256), "projection": None}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(
    "device, dtype, backend, folded",
    [
        ("cpu", torch.float32, "auto", True),
        ("cpu", torch.bfloat16, "library", True),
        pytest.param("meta", torch.bfloat16, "auto", True, marks=needs_triton),
        pytest.param("meta", torch.float16, "triton", True, marks=needs_triton),
        pytest.param("meta", torch.float32, "triton", True, marks=needs_triton),
        ("meta", torch.float32, "auto", False),
        ("meta", torch.bfloat16, "library", False),
        ("meta", torch.bfloat16, "reference", True),
        ("meta", torch.float64, "auto", True),
    ],
)
def test_blocks_are_folded_on_a_gpu_where_triton_makes_expand_one_pass(device, dtype, backend, folded):
    k = plan.resolve_block(dtype, torch.device(device), backend, **BLOCK)
    assert k.gram_folding is folded
    assert plan.resolve_block(dtype, torch.device(device), backend, 64, None, None).gram_folding is folded


@needs_triton
@pytest.mark.parametrize(
    "first, last, projection, one_pass, folded, fold_projection",
    [
        (64, (64, 256), (64, 256), True, True, True),
        (128, (128, 512), (256, 512), True, True, True),
        (256, (256, 1024), (512, 1024), False, True, True),
        (512, (512, 2048), (1024, 2048), False, True, False),
        (1024, (1024, 2048), (1024, 2048), False, False, False),  # wide_resnet50_2's layer4
    ],
)
def test_forms_of_a_bottleneck_on_a_gpu(first, last, projection, one_pass, folded, fold_projection, monkeypatch):
    """By channels alone, as docs/arithmetic.md has it: what is saved is the same for every batch."""
    monkeypatch.setattr(plan, "_extension_on_gpu", lambda dtype, device_type: True)
    k = plan.resolve_block(torch.bfloat16, META, "auto", first, last, projection)
    assert (k.one_pass, k.gram_folding, k.fold_projection) == (one_pass, folded, fold_projection)
    if folded:
        assert {plan.origin(getattr(k, name)) for name in ("projection_conv", "projection_dgrad")} == {"projection"}


COSTS = "{} channels would cost more products than it saves bytes (modelled)"


@needs_triton
@pytest.mark.parametrize(
    "dtype, last, projection, extension, form",
    [
        (torch.bfloat16, (64, 256), None, True, "Gram-folded"),
        (torch.bfloat16, (64, 256), (64, 256), True, "Gram-folded, projection too"),
        (torch.bfloat16, (512, 2048), (1024, 2048), True, f"Gram-folded, projection stored: {COSTS}"),
        (
            torch.bfloat16,
            (64, 256),
            (64, 256),
            False,
            "Gram-folded, projection stored: the projection extension does not run",
        ),
        (torch.bfloat16, (1024, 2048), None, True, f"convs stored: {COSTS}"),
        (torch.float32, (64, 256), None, True, "convs stored: products of float32 are the library's"),
        (torch.float64, (64, 256), (64, 256), True, "Gram-folded, projection too"),
        (torch.bfloat16, None, (64, 128), True, "convs stored, projection Gram-folded"),
        (torch.bfloat16, None, (64, 128), False, "convs stored"),
        (torch.bfloat16, None, (128, 256), True, "convs stored"),
        (torch.float64, None, (64, 128), True, "convs stored, projection Gram-folded"),
    ],
)
def test_the_form_of_a_block_in_words(dtype, last, projection, extension, form, monkeypatch):
    monkeypatch.setattr(plan, "_extension_on_gpu", lambda dtype, device_type: extension)
    words = plan.form_of_block(dtype, META, "auto", 64, last, projection)
    if "extension does" in form or form == "Gram-folded, projection too":
        by_triton = plan.form_of_block(torch.bfloat16, META, "triton", 64, last, projection)
        assert by_triton == "Gram-folded, projection stored: the projection extension does not run"
    by_library = plan.form_of_block(torch.bfloat16, META, "library", 64, last, projection)
    assert by_library == ("convs stored" if last is None else "convs stored: Triton's kernels do not run")
    counted = f"folding {last[0]}" if last and "convs" in form else f"folding its {(projection or (0,))[0]}"
    assert words.startswith(form.format(counted))


@needs_triton
def test_without_the_extension_a_projection_is_stored_as_any_1x1_conv(monkeypatch):
    monkeypatch.setattr(plan, "_extension_on_gpu", lambda dtype, device_type: False)
    k = plan.resolve_block(torch.bfloat16, META, "auto", 64, (64, 256), (64, 256))
    assert k.gram_folding and not k.fold_projection and k.projection_conv is k.conv1x1


@needs_triton
class TestPerCall:
    def conv(self, pixels, inputs, outputs, device=None):
        x = torch.empty(1, 1, pixels, inputs, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device="meta")
        return plan.choose(plan.resolve(torch.bfloat16, META).conv1x1, (x, weight), {})

    def test_memory_bound_calls_are_tritons_and_compute_bound_ones_the_librarys(self):
        """One pass against two, and 0.4 of the datasheet's products against 0.6."""
        narrow, wide = self.conv(802_816, 256, 64), self.conv(100_000, 8192, 4096)
        assert plan.origin(narrow.launcher) == "triton" and "modelled" in narrow.reason
        assert plan.origin(wide.launcher) == "library"
        ours, library = map(int, re.fullmatch(r"modelled (\d+), library (\d+)", narrow.reason).groups())
        # x and y once, and once more y; three launches for its statistics among the library's.
        assert ours == pytest.approx(3 + 802_816 * 320 * 2 / 3.6e6, abs=1)
        assert library > ours + 802_816 * 64 * 2 / 3.6e6

    def test_a_gpus_table_overrules_the_model(self, monkeypatch):
        found = {}

        def seconds(device, label):
            found["label"] = label
            return {"triton": 2e-3, "library": 1e-3}

        monkeypatch.setattr(plan.tuned, "seconds", seconds)
        choice = self.conv(802_816, 256, 64)
        assert plan.origin(choice.launcher) == "library" and choice.reason == "measured 1000, triton 2000"
        assert found["label"] == ("conv1x1 bfloat16: x 1x1x802816x256, weight 64x256, stride 1, with_stats True")

    def test_a_table_that_lacks_a_namespace_does_not_decide(self, monkeypatch):
        monkeypatch.setattr(plan.tuned, "seconds", lambda device, label: {"library": 1e-9})
        assert self.conv(802_816, 256, 64).reason.startswith("modelled")

    def test_the_calls_result_is_the_chosen_launchers(self, monkeypatch):
        k = plan.PerCall("conv1x1", {"library": library.conv1x1, "reference": reference.conv1x1})
        x, weight = torch.randn(1, 2, 2, 8), torch.randn(4, 8)
        for first, second in (("library", "reference"), ("reference", "library")):
            monkeypatch.setattr(plan.tuned, "seconds", lambda *_, t={first: 1.0, second: 2.0}: t)
            k._choices.clear()
            expected = {"library": library, "reference": reference}[first].conv1x1(x, weight)[0]
            assert torch.equal(k(x, weight)[0], expected)

    def conv3x3(self, stride=1, dilation=1, groups=1, kernel="conv3x3"):
        shapes = {"conv3x3": [(256, 56, 56, 64), (64, 64 // groups, 3, 3)]}
        shapes["conv3x3_dgrad"] = [(256, 56, 56, 64), (64, 64 // groups, 3, 3)]
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes[kernel]]
        k = plan.resolve(torch.bfloat16, META)
        if kernel == "conv3x3":
            return plan.choose(k.conv3x3, (*tensors, stride, dilation, groups), {})
        bn = torch.empty(4, 64, device="meta")
        return plan.choose(k.conv3x3_dgrad, (*tensors, (56, 56)), {"y": tensors[0], "bn": bn})

    def test_a_3x3_convs_passes_are_tritons_whoever_convolves(self):
        fprop, dgrad = self.conv3x3(), self.conv3x3(kernel="conv3x3_dgrad")
        assert plan.origin(fprop.launcher) == "library" and plan.origin(dgrad.launcher) == "triton"
        passes = fprop.launcher.keywords["passes"]
        assert {plan.origin(launcher) for launcher in plan.launchers(passes).values()} == {"triton"}
        # Three passes of 64 channels in 16 bits and a product, against one that does it all.
        triton, library = map(int, re.fullmatch(r"modelled (\d+), library (\d+)", dgrad.reason).groups())
        product = 2 * 9 * 64 * 64 * 802_816 / 989.5e6
        assert triton == pytest.approx(3 + product / 0.4, abs=1)
        assert library == pytest.approx(6 + product / 0.6 + 3 * 128 * 802_816 / 3.6e6, abs=1)

    @pytest.mark.parametrize("form", [{"groups": 4}, {"stride": 2, "dilation": 2}])
    def test_what_triton_has_not_is_the_librarys_without_a_choice(self, form):
        choice = self.conv3x3(**form)
        assert plan.origin(choice.launcher) == "library"
        assert choice.reason == "Triton has no groups, and no dilation at a stride"

    @pytest.mark.parametrize("channels", [(3, 64), (64, 16), (100, 64)])
    def test_3x3_convs_of_few_channels_are_the_librarys(self, channels):
        x = torch.empty(256, 224, 224, channels[0], dtype=torch.bfloat16, device="meta")
        weight = torch.empty(channels[1], channels[0], 3, 3, dtype=torch.bfloat16, device="meta")
        dy = torch.empty(256, 224, 224, channels[1], dtype=torch.bfloat16, device="meta")
        k = plan.resolve(torch.bfloat16, META)
        fprop = plan.choose(k.conv3x3, (x, weight), {})
        dgrad = plan.choose(k.conv3x3_dgrad, (dy, weight, (224, 224)), {})
        wgrad = plan.choose(k.conv3x3_wgrad, (x, dy), {})
        for choice in (fprop, dgrad, wgrad):
            assert plan.origin(choice.launcher) == "library" and "too few channels" in choice.reason

    def test_what_takes_as_long_is_the_librarys(self, monkeypatch):
        monkeypatch.setattr(plan.tuned, "seconds", lambda device, label: {"triton": 1.0, "library": 1.0})
        assert plan.origin(self.conv(1235, 256, 64).launcher) == "library"

    def test_images_are_padded_where_that_was_measured_to_be_faster(self, monkeypatch):
        k = plan.resolve(torch.bfloat16, META)

        def stem(channels):
            x = torch.empty(2, 224, 224, channels, dtype=torch.bfloat16, device="meta")
            weight = torch.empty(64, channels, 7, 7, dtype=torch.bfloat16, device="meta")
            return plan.choose(k.conv2d, (x, weight, (2, 2), (3, 3)), {})

        assert re.fullmatch(r"modelled \d+, pad 4 \d+, pad 8 \d+", stem(3).reason)
        table = {"library": 3.0, "pad 4": 2.0, "pad 8": 1.0}
        monkeypatch.setattr(plan.tuned, "seconds", lambda device, label: table)
        k.conv2d._choices.clear()
        assert stem(3).launcher.keywords == {"channels": 8}
        assert stem(4).reason == "there is nothing to pad"

    def test_choosing_is_not_seen_by_modes_around(self):
        """A counter around a training step must not count the model's own operators."""
        with Watch() as watch:
            self.conv(1234, 256, 64)
        assert watch.seen == ["empty", "empty"]


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_tables_are_found_by_the_gpus_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    tuned.table.cache_clear()
    device, call = torch.device("cuda", 0), "conv1x1 bfloat16: x 1x1x1x8"
    assert tuned.seconds(device, call) is None and tuned.seconds(CPU, call) is None
    seconds = {call: {"triton": 1e-5, "library": 2e-5}}
    assert tuned.write("NVIDIA H200", {"torch": "2"}, seconds, tmp_path) == tmp_path / "nvidia-h200.json"
    tuned.table.cache_clear()
    assert tuned.seconds(device, call) == {"triton": 1e-5, "library": 2e-5}
    (tmp_path / "nvidia-h200.json").write_text("{}")
    tuned.table.cache_clear()
    with pytest.raises(ValueError, match="nvidia-h200.json is not a table of measured seconds .*install fastres again"):
        tuned.seconds(device, call)
    tuned.table.cache_clear()


@pytest.mark.parametrize(
    "channels, outputs, stride, images, dtype, backend, folded",
    [
        (64, 256, 1, 256, torch.bfloat16, "auto", True),
        (256, 512, 2, 256, torch.float16, "auto", True),
        (512, 1024, 1, 512, torch.bfloat16, "auto", False),  # too many channels for mma.sync
        (64, 256, 1, 8, torch.bfloat16, "auto", False),  # too few pixels to make up for the small matrices
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
    assert set(plan.launchers(k)) == set(reference.__all__)


def test_what_folding_a_projection_saves():
    """The figures of docs/arithmetic.md, in seconds: those of ResNet-50's first three layers at a batch of 256."""
    pixels = 256 * 56 * 56
    layers = (pixels, 64, 256, False), (pixels // 4, 256, 512, True), (pixels // 16, 512, 1024, True)
    saved = {
        few: [round(plan.seconds_saved_by_folding(*layer, few) * 1e3, 2) for layer in layers] for few in (True, False)
    }
    assert saved == {True: [0.54, 0.12, -0.1], False: [0.37, -0.05, -0.27]}


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
