"""The gate lets right results through and nothing else."""

from types import SimpleNamespace

import pytest
import torch

from fastres import cases, nn, plan
from fastres.kernels import library
from fastres.measure import gate, kernels, modules, training
from fastres.nn import make_shortcut

CPU = torch.device("cpu")
CASE = cases.BY_NAME["bn_act, shortcut identity, ReLU"]
SIZES = {"n": 4, "h": 9, "w": 7, "c": 24}


def make(n, dtype=torch.float32):
    return CASE.make(kernels.Maker(dtype, CPU), **SIZES | {"n": n})


def judge(bn_act, dtype=torch.float32):
    k = SimpleNamespace(**vars(kernels.launchers("library")) | {"bn_act": bn_act})
    return gate.judge_case(CASE, k, make(4, dtype), 4, make)


def slightly_wrong(*args, **kwargs):
    return library.bn_act(*args, **kwargs) * 1.001


def not_a_number(*args, **kwargs):
    out = library.bn_act(*args, **kwargs)
    out[0, 0, 0, 0] = float("nan")
    return out


def unwritten_rest(y, *args, **kwargs):
    """Right, but for the last image, which the kernel does not reach."""
    out = torch.empty_like(y)
    out[:-1] = library.bn_act(y, *args, **kwargs)[:-1]
    return out


def lucky_rest(y, *args, **kwargs):
    """The same in memory that happens to hold the right result already."""
    right = library.bn_act(y, *args, **kwargs)
    left_behind = right.clone()
    del left_behind
    out = y.new_empty(y.shape)
    out[:-1] = right[:-1]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_kernel_passes(dtype):
    verdict = judge(library.bn_act, dtype)
    assert verdict.refused is None
    assert verdict.text.startswith("1 results, worst ") and "(out)" in verdict.text


@pytest.mark.parametrize("wrong", [slightly_wrong, not_a_number, unwritten_rest, lucky_rest])
def test_a_wrong_kernel_is_refused(wrong):
    assert judge(wrong).refused.startswith("wrong results: out: error")


def test_a_kernel_that_cannot_run_is_refused_with_the_reason():
    def fails(*args, **kwargs):
        raise RuntimeError("no such shape")

    assert judge(fails).refused == "RuntimeError: no such shape"


def test_a_missing_result_is_refused():
    results = [{"out": torch.ones(3)}]
    exact = [{"out": torch.ones(3), "dx": torch.ones(3)}]
    assert "results differ" in gate.judge(results, results, exact, torch.float32).refused


def test_inputs_stay_as_they_are():
    case = cases.BY_NAME["projection, stride 2"]  # adds to its dx in place
    t = case.make(kernels.Maker(torch.float32, CPU), **case.sizes)
    before = cases.copied(t)
    verdict = gate.judge_case(case, kernels.launchers("library"), t, 4, lambda n: None)
    assert verdict.refused is None
    assert all(torch.equal(t[name], before[name]) for name in t)


def test_too_little_memory_for_exact_results_takes_fewer_images(monkeypatch):
    bn_act = gate.reference.bn_act

    def short_of_memory(y, *args, **kwargs):
        if y.dtype == torch.float64 and y.shape[0] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return bn_act(y, *args, **kwargs)

    monkeypatch.setattr(gate.reference, "bn_act", short_of_memory)
    verdict = judge(library.bn_act)
    assert verdict.refused is None and verdict.text.endswith(", 1 images")
    assert judge(slightly_wrong).refused


def test_too_little_memory_for_a_single_image_refuses(monkeypatch):
    def none_left(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gate.reference, "bn_act", none_left)
    assert judge(library.bn_act).refused == "the gate is out of memory"


def test_memory_is_poisoned_only_inside():
    with gate.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with gate.poisoned():
            pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_has_no_deterministic_algorithm_is_judged_in_ordinary_memory():
    def bn_act(*args, **kwargs):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return library.bn_act(*args, **kwargs)

    assert judge(bn_act).refused is None


def test_exact_arithmetic_has_no_tf32_and_puts_settings_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with gate.exact_arithmetic():
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_a_baseline_may_round_elsewhere_but_not_compute_something_else():
    exact = [{"out": torch.randn(1000).double()}]
    stock = [{"out": exact[0]["out"].float()}]
    flipped = exact[0]["out"].float().clone()
    flipped[0] += 0.1
    assert gate.judge([{"out": flipped}], stock, exact, torch.float32).refused
    assert gate.judge([{"out": flipped}], stock, exact, torch.float32, gate.BASELINE).refused is None
    assert gate.judge([{"out": 1.1 * flipped}], stock, exact, torch.float32, gate.BASELINE).refused


def bottleneck():
    return nn.Bottleneck(16, 8, 2, make_shortcut("B", 16, 32, 2))


def planted(name, change):
    """Every plan's kernel `name` with its result changed."""

    def wrap(k):
        launcher = getattr(k, name)
        return SimpleNamespace(**vars(k) | {name: lambda *args, **kwargs: change(launcher(*args, **kwargs))})

    return plan.wrapping(wrap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("experiment", "factor"),
    [
        (lambda dtype: training.unit_training("unit", bottleneck, (2, 16, 12, 12), dtype, CPU), 1.2),
        # The gradients of a whole network in bfloat16 are far from exact: stock's too.
        (lambda dtype: training.model_training("cifar_resnet11_bottleneck", (8, 3, 32, 32), dtype, CPU), 3.0),
    ],
    ids=["unit", "model"],
)
def test_a_wrong_kernel_in_a_unit_or_a_model_is_refused(experiment, factor, dtype):
    prepare = experiment(dtype).variants["fastres"].prepare
    assert prepare().verdict.refused is None

    def first(results):
        return results[0] * factor, *results[1:]

    for name, change in (("expand", lambda out: out * factor), ("conv3x3_dgrad", first), ("gram_bwd", first)):
        with planted(name, change):
            assert prepare().verdict.refused.startswith("wrong results"), name


def test_decided_masks_leave_no_value_near_zero():
    stock = training._stock(bottleneck)
    subject = modules.Subject(stock, modules.Flavour(), torch.float32, CPU)
    near = []
    for norm in (subject.module.bn1, subject.module.bn2):
        norm.register_forward_hook(lambda module, args, out: near.append(out.abs().min().item()))
    with subject.as_it_was():
        subject.decide_masks()
        subject(torch.randn(4, 16, 12, 12))
    assert min(near) > 1, "a mask that rounding could flip"
    assert all(torch.equal(a, b) for a, b in zip(subject.module.parameters(), stock.parameters(), strict=True))
