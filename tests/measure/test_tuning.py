"""What the plan chooses by, measured: on a CPU, where times mean nothing and everything else is the same."""

from __future__ import annotations

import importlib.util
import json
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
    expected = {"conv1x1", "conv3x3", "expand", "expand_wgrad", "gram"}
    assert {choice.call.kernel for choice in choices.values()} >= expected
    for label, choice in choices.items():
        of_an_image = choice.call.kernel.startswith("conv2d")
        forms = ["library", "pad 4", "pad 8"] if of_an_image else ["triton", "library"]
        assert choice.call.label == label and list(choice.launchers) == forms
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
    seen = {"triton": [], "library": []}

    def launcher(name):
        def launch(**t):
            seen[name].append(t)
            return reference.conv1x1(**t)

        return launch

    (choice,) = (c for label, c in choices.items() if label.startswith("conv1x1 bfloat16: x 4x32x32x16,"))
    wanted = choice._replace(launchers={name: launcher(name) for name in seen})
    found, failures = tuning.measure([wanted], torch.device("cpu"), lambda: 60.0, SHORT)
    assert failures == {} and set(found[choice.call.label]) == {"triton", "library"}
    assert all(seconds > 0 for seconds in found[choice.call.label].values())
    ours, librarys = (calls[0] for calls in seen.values())
    assert ours["x"].shape == (4, 32, 32, 16) and ours["x"].dtype == torch.bfloat16 and ours["x"].std() > 0.5
    assert all(ours[name] is librarys[name] for name in ours)


def test_what_fails_is_said_and_what_has_no_time_left_out(choices):
    def broken(**t):
        raise RuntimeError("does not compile")

    first, second = [choice for choice in choices.values() if choice.call.kernel == "conv1x1"][:2]
    wanted = first._replace(launchers={"triton": broken, "library": library.conv1x1})
    times = iter([60.0, 0.1])
    found, failures = tuning.measure([wanted, second], torch.device("cpu"), lambda: next(times), SHORT)
    assert found == {} and failures == {first.call.label: "triton: RuntimeError: does not compile"}


def test_where_there_is_no_choice_it_says_so():
    with pytest.raises(ValueError, match="leaves the plan of a GPU no choice: tune it in bfloat16 or float16"):
        tuning.choices(models.cifar_resnet11_bottleneck(), (2, 3, 64, 64), torch.float32)


@pytest.fixture
def tune(monkeypatch):
    """The command, as a module."""
    spec = importlib.util.spec_from_file_location("tune", ROOT / "benchmarks" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_the_command_says_so(tune, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2 and "sees no CUDA device" in capsys.readouterr().out


def test_the_command_writes_what_it_measured_and_keeps_the_rest(tune, tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imagined GPU")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "package")
    facts = {"torch": "2"}
    monkeypatch.setattr(tune.conditions, "gather", lambda device: facts)
    outcomes = iter([(1, 0), (0, 1), (2, 0), (0, 0), (1, 0)])

    def measure(wanted, device, left):
        (few, failing), wanted = next(outcomes), list(wanted)
        took = {"triton": 1e-6 * few, "library": 2e-6}
        return {c.call.label: took for c in wanted[:few]}, {c.call.label: "broken" for c in wanted[few : few + failing]}

    monkeypatch.setattr(tune.tuning, "measure", measure)

    def run(dtype):
        code = tune.main(
            ["--model", "cifar_resnet11_bottleneck", "--batch", "2", "--dtype", dtype, "--out", str(tmp_path)]
        )
        tables = [folder / "imagined-gpu.json" for folder in (tmp_path, tmp_path / "package")]
        return code, capsys.readouterr().out, [json.loads(file.read_text())["seconds"] for file in tables]

    code, out, (table, copy) = run("bf16")
    assert code == 0 and len(table) == 1 and table == copy and "no time was left for" in out
    code, out, (same, _) = run("fp16")
    assert code == 1 and same == table and "broken" in out, "what failed changes nothing"
    _, _, (both, _) = run("fp16")
    assert len(both) == 3 and both.items() > table.items()
    facts["torch"] = "3"
    assert run("bf16")[2][0] == both, "nothing measured, nothing written"
    assert run("bf16")[2][0] == table, "other versions, another table"
    (tmp_path / "imagined-gpu.json").write_text("{")
    tuned.write("Imagined GPU", facts, table, tmp_path)
    assert json.loads((tmp_path / "imagined-gpu.json").read_text())["seconds"] == table, "damaged, and written anew"
