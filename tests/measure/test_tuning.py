"""What the plan chooses by, measured: on a CPU, where times mean nothing and everything else is the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastres import models, plan, tuned
from fastres.kernels import library, reference
from fastres.measure import tuning
from fastres.measure.timing import Settings

ROOT = Path(__file__).resolve().parents[2]
SHORT = Settings(burst=0, samples=3, limit=1.0, warmup=0, first=1, window=1)


@pytest.fixture(scope="module")
def choices():
    pytest.importorskip("triton")
    return tuning.choices(models.cifar_resnet11_bottleneck(), (4, 3, 32, 32), torch.bfloat16)


def test_the_calls_of_a_training_step_that_the_plan_has_a_choice_for(choices):
    assert {choice.call.kernel for choice in choices.values()} >= {"conv1x1", "expand", "expand_wgrad", "gram"}
    for label, choice in choices.items():
        assert choice.call.label == label and list(choice.launchers) == ["triton", "library"]
    first = "conv1x1 bfloat16: x 4x32x32x16, weight 16x16, stride 1, with_stats True"
    assert first in choices and not any("layer" in label for label in choices)


def test_labels_are_those_that_the_plan_asks_the_table_for(choices, monkeypatch):
    asked = []
    monkeypatch.setattr(tuned, "seconds", lambda device, label: asked.append(label))
    k = plan.resolve(torch.bfloat16, torch.device("meta"))
    for choice in choices.values():
        getattr(k, choice.call.kernel)._choices.clear()
        plan.choose(getattr(k, choice.call.kernel), choice.call.args, choice.call.kwargs)
    assert asked == list(choices)


def test_every_launcher_is_timed_on_the_same_inputs(choices):
    seen = []

    def launcher(**t):
        seen.append(t)
        return reference.conv1x1(**t)

    (choice,) = (c for label, c in choices.items() if label.startswith("conv1x1 bfloat16: x 4x32x32x16,"))
    wanted = choice._replace(launchers={"triton": launcher, "library": library.conv1x1})
    found, failures = tuning.measure([wanted], torch.device("cpu"), lambda: 60.0, SHORT)
    assert failures == {} and set(found[choice.call.label]) == {"triton", "library"}
    assert all(seconds > 0 for seconds in found[choice.call.label].values())
    assert seen[0]["x"].shape == (4, 32, 32, 16) and seen[0]["x"].dtype == torch.bfloat16 and seen[0]["x"].std() > 0.5


def test_what_fails_or_has_no_time_is_said(choices):
    def broken(**t):
        raise RuntimeError("does not compile")

    first, second = list(choices.values())[:2]
    wanted = first._replace(launchers={"triton": broken, "library": library.conv1x1})
    times = iter([60.0, 0.1])
    found, failures = tuning.measure([wanted, second], torch.device("cpu"), lambda: next(times), SHORT)
    assert found == {} and failures == {
        first.call.label: "triton: RuntimeError: does not compile",
        second.call.label: "no time left",
    }


@pytest.mark.parametrize(
    "model, dtype", [("cifar_plain20", torch.bfloat16), ("cifar_resnet11_bottleneck", torch.float32)]
)
def test_where_there_is_no_choice_it_says_so(model, dtype):
    with pytest.raises(ValueError, match="leaves the plan of a GPU no choice: tune a model with 1x1"):
        tuning.choices(models.create(model), (2, 3, 64, 64), dtype)


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = importlib.util.spec_from_file_location("tune", ROOT / "benchmarks" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.main([]) == 2 and "sees no CUDA device" in capsys.readouterr().out
