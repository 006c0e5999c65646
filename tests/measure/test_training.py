"""Units and models as experiments."""

import pytest
import torch

from fastres import cost, models, nn, plan
from fastres.conversion import revert
from fastres.kernels import library
from fastres.measure import experiment, modules, timing, training
from fastres.measure.modules import Flavour, Subject
from fastres.memory import saved_bytes
from fastres.nn.fused import FusedModule

CPU = torch.device("cpu")
FAST = timing.Settings(burst=0.0, samples=1, limit=1e9, warmup=0.0, first=1, window=1)
MODEL, SHAPE = "cifar_resnet11_bottleneck", (4, 3, 16, 16)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name in ("UNIT_SETTINGS", "MODEL_SETTINGS"):
        monkeypatch.setattr(training, name, {"cpu": FAST, "cuda": FAST})


def rows(wanted):
    report = experiment.run(wanted, timing.HostClock(), lambda: 1e9)
    assert report.failures == {}
    return {(row.variant, row.phase): row for row in report.rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_split_and_every_variant_timed(dtype):
    found = rows(training.model_training(MODEL, SHAPE, dtype, CPU))
    variants = list(dict.fromkeys(variant for variant, _ in found))
    assert variants[:3] == ["eager NCHW", "eager channels_last", "fastres"]
    for variant in variants:
        forward, backward, optimizer, step = (
            found[variant, phase].seconds for phase in ("forward", "backward", "optimizer", "step")
        )
        assert step == pytest.approx(forward + backward + optimizer)
    row = found["fastres", "step"]
    assert (row.name, row.shape, row.batch, row.peak_memory) == (MODEL, SHAPE, 4, None)
    assert "% of what is allowed" in row.gate and found["eager channels_last", "step"].gate == ""


def test_stock_rows_carry_the_cost_models_bytes():
    found = rows(training.model_training(MODEL, SHAPE, torch.float32, CPU))
    steps = cost.training_step(models.create(MODEL), SHAPE, torch.float32, scheme="stock")
    assert found["eager NCHW", "step"].bytes == cost.total(steps).bytes
    forward, backward = (found["eager NCHW", phase] for phase in ("forward", "backward"))
    assert forward.flops + backward.flops == cost.total(steps).flops
    assert found["eager NCHW", "optimizer"].bytes is None
    assert found["fastres", "step"].bytes is None  # on a CPU


def test_a_units_work_includes_its_inputs_gradient():
    def make():
        return nn.BasicBlock(8, 8)

    found = rows(training.unit_training("b", make, (2, 8, 6, 6), torch.float32, CPU))
    conv = 2 * (2 * 6 * 6) * 8 * 8 * 9
    assert found["eager NCHW", "forward"].flops == 2 * conv
    assert found["eager NCHW", "backward"].flops == 4 * conv
    stem = rows(training.unit_training("s", nn.Stem, (2, 3, 16, 16), torch.float32, CPU))
    assert stem["eager NCHW", "backward"].flops == stem["eager NCHW", "forward"].flops


def test_saved_bytes_are_those_of_the_module():
    def make():
        return nn.Bottleneck(32, 8)

    found = rows(training.unit_training("b", make, (2, 32, 6, 6), torch.float32, CPU))
    x = torch.randn(2, 32, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    assert found["fastres", "step"].saved_bytes == saved_bytes(make(), x)
    assert found["eager channels_last", "step"].saved_bytes == saved_bytes(revert(make()), x)
    assert found["fastres", "step"].saved_bytes < found["eager channels_last", "step"].saved_bytes


def test_inference_is_one_phase_in_eval_mode():
    wanted = training.model_inference(MODEL, SHAPE, torch.float32, CPU)
    found = rows(wanted)
    assert {phase for _, phase in found} == {"inference"}
    assert found["fastres", "inference"].saved_bytes is None


def test_a_loss_that_explodes_refuses_the_times(monkeypatch):
    ready = training.model_training(MODEL, SHAPE, torch.float32, CPU).variants["fastres"].prepare()
    ready.parts["forward"]()
    assert ready.finish() is None
    monkeypatch.setattr(training.F, "cross_entropy", lambda logits, labels: logits.sum() * float("inf"))
    ready.parts["forward"]()
    assert ready.finish() in ("the loss became inf", "the loss became -inf")


def test_flavours_differ_where_the_plan_does(monkeypatch):
    names = list(modules.flavours(torch.float32, CPU, ["default", "max-autotune"]))
    assert [n for n in names if n.startswith("compile")] == ["compile default", "compile max-autotune"]
    same = dict.fromkeys(("bn_act", "expand"), "library")
    monkeypatch.setattr(plan, "origins", lambda dtype, device, backend: same)
    assert "fastres library" not in modules.flavours(torch.float32, CPU, [])
    monkeypatch.setattr(plan, "origins", lambda dtype, device, backend: same | {"bn_act": backend})
    assert modules.flavours(torch.float32, CPU, [])["fastres library"].backend == "library"
    assert "fastres stored" not in modules.flavours(torch.float32, CPU, [])
    monkeypatch.setattr(plan, "origins", lambda dtype, device, backend: same | {"bn_act": "triton"})
    found = modules.flavours(torch.float32, CPU, [])
    assert found["fastres stored"].change and found["fastres blocks"].granularity == "block"


def test_a_plan_without_tritons_3x3_convolutions():
    pytest.importorskip("triton")
    k = plan.resolve(torch.bfloat16, torch.device("meta"))
    changed = modules._with_the_librarys_3x3(k)
    assert {plan.origin(getattr(changed, name)) for name in plan.CONV3X3} == {"library"}
    assert changed.expand is k.expand


def test_a_stored_step_is_one_forward_and_backward(monkeypatch):
    """By the library's convolutions: what a Gram-folded plan is to be faster than."""
    called = []

    def noting(name):
        run = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *args, **kwargs: called.append(name) or run(*args, **kwargs))

    for name in plan.BY_COST:
        noting(name)
    subject = Subject(revert(nn.Bottleneck(32, 8)), Flavour(backend="auto", change=modules._stored), torch.float32, CPU)
    x = subject.place(torch.randn(2, 32, 6, 6, requires_grad=True))
    outputs = []
    subject.planned(lambda: outputs.append(subject(x)))()
    subject.planned(lambda: outputs.pop().sum().backward())()
    convs = {f"{conv}{direction}" for conv in ("conv1x1", "conv3x3") for direction in ("", "_dgrad", "_wgrad")}
    assert set(called) == convs and x.grad is not None


def test_compilation_needs_time_in_proportion_to_the_model():
    modes = ["default", "max-autotune"]
    variants = training.model_training(MODEL, SHAPE, torch.float32, CPU, modes).variants
    assert variants["eager NCHW"].needs == variants["fastres"].needs == 0
    assert variants["compile max-autotune"].needs > variants["compile default"].needs > 0


def test_subjects_start_from_the_same_weights_and_run_as_their_flavour_says():
    stock = revert(nn.Bottleneck(32, 8))
    ours = Subject(stock, Flavour(backend="library"), torch.bfloat16, CPU)
    assert isinstance(ours.module, FusedModule) and ours.module.backend == "library"
    assert not isinstance(stock, FusedModule)
    eager = Subject(stock, Flavour(torch.contiguous_format), torch.bfloat16, CPU)
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    assert eager.place(x).is_contiguous() and ours.place(x).is_contiguous(memory_format=torch.channels_last)
    assert ours.place(x).requires_grad and ours(ours.place(x)).dtype == torch.bfloat16
    exact = Subject(stock, Flavour(), torch.float64, CPU)
    assert exact(exact.place(x)).dtype == torch.float64
    for subject in (ours, eager, exact):
        for mine, given in zip(subject.module.parameters(), stock.parameters(), strict=True):
            assert torch.equal(mine, given.to(mine.dtype)) and mine.data_ptr() != given.data_ptr()


def test_peak_memory_is_what_a_step_adds(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100)
    subject = Subject(torch.nn.Identity(), Flavour(), torch.float32, CPU)
    assert subject.peak_memory(30, lambda: calls.append("step")) is None
    subject._device = torch.device("cuda")
    assert subject.peak_memory(30, lambda: calls.append("step")) == 70
    assert calls == ["step", "step", "wait", "reset", "step", "wait"]
    subject._flavour = Flavour(mode="reduce-overhead")
    assert subject.peak_memory(30, lambda: calls.append("step")) is None


def test_compiling_needs_a_compiler_on_a_cpu(monkeypatch):
    monkeypatch.setattr(modules.shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in modules.cannot_compile(CPU)
    assert modules.cannot_compile(torch.device("cuda")) is None
