"""Kernel cases as experiments."""

import time
from types import SimpleNamespace

import pytest
import torch

from fastres import backends, cases, cost
from fastres.measure import experiment, kernels, timing

CPU = torch.device("cpu")
GPU_SETTINGS = kernels.SETTINGS["cuda"]
FAST = timing.Settings(burst=0.0, samples=2, limit=1e9, warmup=0.0, first=1, window=1)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(kernels, "SETTINGS", {"cpu": FAST, "cuda": FAST})


def experiments(name, **options):
    case = cases.BY_NAME[name]
    return list(kernels.experiments(case, torch.float32, CPU, case.sizes, **options))


def rows(wanted):
    report = experiment.run(wanted, timing.HostClock(), lambda: 1e9)
    assert report.failures == report.skipped == {}
    return {row.variant: row for row in report.rows}


def test_the_whole_case_and_each_of_its_kernels_are_experiments():
    found = experiments("conv1x1 backward, stride 1, residual", eager={"conv1x1_wgrad, bn, grad, y": lambda t: None})
    assert [e.name.removeprefix("conv1x1 backward, stride 1, residual") for e in found] == [
        "",
        " / conv1x1_dgrad, bn, grad, y, residual",
        " / conv1x1_wgrad, bn, grad, y",
    ]
    assert [list(e.variants) for e in found] == [
        ["fastres library", "eager"],
        ["fastres library"],
        ["fastres library", "eager"],
    ]
    assert found[0].shape == (2, 9, 8, 24, 40) and found[0].batch == 2


def test_a_case_of_one_kernel_is_one_experiment():
    assert [e.name for e in experiments("bn_act, shortcut none, ReLU")] == ["bn_act, shortcut none, ReLU"]


def test_only_the_kernels_asked_for_are_timed_alone():
    found = experiments("expand", whole=False, singles=("gram", "gram_bwd"))
    assert [e.name for e in found] == ["expand / gram", "expand / gram_bwd, mean, scatter"]


def test_every_namespace_that_has_the_kernel_is_a_variant(monkeypatch):
    available = {"reference": None, "library": None, "triton": None, "projection": "not built"}
    monkeypatch.setattr(backends, "available", lambda: available)
    modules = {"triton": SimpleNamespace(bn_act=None), "projection": SimpleNamespace(projection_gram=None)}
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: modules.get(name) or load(name))
    f32, f16, cuda = torch.float32, torch.float16, torch.device("cuda")
    assert kernels.namespaces(["bn_act"], f32, cuda) == ["library", "triton"]
    assert kernels.namespaces(["bn_act"], f32, CPU) == ["library"]
    assert kernels.namespaces(["bn_act"], torch.float64, cuda) == ["library"]
    assert kernels.namespaces(["conv1x1"], f32, CPU) == ["library"]
    assert kernels.namespaces(["gram_bwd"], f32, CPU) == ["reference"]
    available["projection"] = None
    modules["projection"].cuda_available = lambda: None
    assert kernels.namespaces(["projection_gram"], f32, CPU) == ["library", "projection"]
    assert kernels.namespaces(["projection_gram"], f16, CPU) == ["library"]
    assert kernels.namespaces(["projection_gram"], f16, cuda) == ["library", "projection"]
    assert kernels.namespaces(["projection_gram"], f32, cuda) == ["library"]
    modules["projection"].cuda_available = lambda: "built without CUDA"
    assert kernels.namespaces(["projection_gram"], f16, cuda) == ["library"]


def test_rows_carry_the_contracts_bytes_and_flops():
    found = rows(experiments("bn_act, shortcut identity, ReLU")[0])
    assert set(found) == {"fastres library", "eager"}
    size = 4 * 9 * 7 * 24 * 4
    for row in found.values():
        assert row.bytes == 3 * size + 4 * 24 * 4 and row.flops == 0
        assert row.seconds > 0 and row.p20 <= row.seconds <= row.p80 and row.samples == 2
    assert found["fastres library"].backend == "library" and "% of what is allowed" in found["fastres library"].gate
    assert found["eager"].backend is None and found["eager"].gate == ""


def test_the_kernels_of_a_case_add_up_to_the_whole():
    whole, *singles = (rows(e)["fastres library"] for e in experiments("conv1x1 backward, stride 1, residual"))
    assert whole.bytes == sum(row.bytes for row in singles)
    assert whole.flops == sum(row.flops for row in singles) == 2 * (2 * 2 * 9 * 8 * 24 * 40)


def test_a_call_is_counted_as_the_cost_model_counts_one_pass():
    case = cases.BY_NAME["conv1x1, stride 2"]
    t = case.make(kernels.Maker(torch.float32, CPU), **case.sizes)
    (call,) = kernels.record(case, kernels.launchers("library"), t).values()
    out = 2 * 5 * 4
    assert call.work.flops == 2 * out * 24 * 40
    statistics = 4 * (1 + 2 * 40)
    assert call.work.bytes == 4 * (out * 24 + 24 * 40 + out * 40) + statistics
    assert cost.kernels.flops(call.kernel, cost.kernels.bind(call.kernel, call.args, call.kwargs), (t["x"],))


def test_a_wrong_kernel_refuses_every_row_that_would_show_its_speed(monkeypatch):
    library = backends.load("library")
    right = library.conv1x1_wgrad
    monkeypatch.setattr(library, "conv1x1_wgrad", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    for wanted in experiments("conv1x1 backward, stride 1, residual"):
        report = experiment.run(wanted, timing.HostClock(), lambda: 1e9)
        row = next(row for row in report.rows if row.variant == "fastres library")
        assert row.seconds is None and row.refused.startswith("wrong results: dW")
        assert set(report.failures) == {"fastres library"} and "fastres library" not in report.calls


def test_inputs_are_rotated_past_the_cache():
    t = {"y": torch.ones(100), "relu": True, "residual": None}
    assert kernels.rotated(t, 0) == [t]
    assert len(kernels.rotated(t, 10)) == 1
    sets = kernels.rotated(t, 250)
    assert len({one["y"].data_ptr() for one in sets}) == 3  # 4*250 bytes
    assert all(torch.equal(one["y"], t["y"]) and one["relu"] for one in sets)
    assert len(kernels.rotated(t, 10**9)) == kernels._SETS


def test_calls_go_through_the_sets_in_turn():
    seen = []
    call = kernels.over("abc", seen.append)
    for _ in range(7):
        call()
    assert seen == list("abcabca")


def test_a_gpus_settings_work_with_events(monkeypatch):
    """CPU tensors under the CUDA clock, its events standing for host instants."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self, stream):
            self.instant = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.instant - self.instant)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**14))
    monkeypatch.setattr(kernels, "SETTINGS", {"cpu": GPU_SETTINGS})
    monkeypatch.setattr(kernels, "cache_of", lambda device: 2**14)
    (wanted,) = experiments("bn_act, shortcut identity, ReLU")
    assert wanted.cycle > 1
    report = experiment.run(wanted, timing.CudaClock(CPU), lambda: 1e9)
    assert report.failures == {}
    assert all(row.seconds > 0 and row.samples == GPU_SETTINGS.samples for row in report.rows)


def test_eager_is_charged_with_its_own_products_and_the_bytes_that_have_to_move():
    """The stock form of a folded convolution computes no Gram matrix, but writes tensors that ours does not."""
    case, device = cases.BY_NAME["expand"], torch.device("cpu")
    sizes = {"n": 2, "h": 9, "w": 7, "k": 32, "c": 64}
    whole = next(kernels.experiments(case, torch.float32, device, sizes))
    ours, eager = (whole.variants[name].prepare().work["call"] for name in ("fastres library", "eager"))
    products = 3 * 2 * (2 * 9 * 7) * 32 * 64
    assert eager.flops == products < ours.flops
    assert eager.bytes == ours.bytes
