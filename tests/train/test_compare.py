import dataclasses
import sys

import pytest
import torch
from torch import nn

from fastres.train import compare, console, data, report
from fastres.train.engine import Run, Trainer
from fastres.train.options import Options

CPU = torch.device("cpu")
OPTIONS = Options(compare=True, epochs=2, batch=16, augment=False)
PNG = b"\x89PNG\r\n\x1a\n"


def rows(difference=0.0, accuracies=(90.0, 90.0), steps=30, from_step=1):
    """The metrics of a run whose losses differ from `from_step` on."""
    result = []
    for step in range(1, steps + 1):
        for variant, extra in (("stock", 0.0), ("fused", difference if step >= from_step else 0.0)):
            result.append(
                {"variant": variant, "epoch": 1, "step": step, "lr": 0.1, "loss": 2 / step + extra, "seconds": 0.1}
            )
    for variant, accuracy in zip(("stock", "fused"), accuracies, strict=True):
        result.append({"variant": variant, "epoch": 1, "step": steps, "test_loss": 1.0, "test_accuracy": accuracy})
    return result


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Bytes saved by the three blocks, stock and fused."""
    values = [100, 50]
    monkeypatch.setattr(compare, "block_memory", lambda: tuple(values))
    return values


def verdicts(rows, **options):
    return [check.ok for check in compare.checks(rows, dataclasses.replace(OPTIONS, min_accuracy=85.0, **options))]


def test_all_is_well_within_the_limits():
    assert verdicts(rows(difference=9e-4, accuracies=(86, 85.1))) == [True, True, True, True]


def test_losses_that_differ_in_the_first_steps_fail():
    assert verdicts(rows(difference=1.1e-3)) == [False, True, True, True]
    assert verdicts(rows(difference=-1.1e-3, from_step=20))[0] is False
    assert verdicts(rows(difference=float("nan"), from_step=2))[0] is False


def test_losses_that_differ_later_are_no_proof_of_anything():
    assert verdicts(rows(difference=1.0, from_step=21))[0] is True


def test_a_run_that_lost_its_first_rows_proves_nothing():
    line = compare.checks([row for row in rows() if row["step"] > 5], OPTIONS)[0]
    assert (line.ok, line.measured) == (None, "metrics.csv lacks them")


def test_losses_of_another_dtype_prove_nothing():
    line = compare.checks(rows(difference=1.0), dataclasses.replace(OPTIONS, dtype="bf16"))[0]
    assert (line.ok, line.verdict, line.measured) == (None, "not measured", "needs --dtype fp32")


@pytest.mark.parametrize("accuracies", [(90, 88.9), (88.9, 90)])
def test_accuracies_apart_fail(accuracies):
    assert verdicts(rows(accuracies=accuracies)) == [True, False, True, True]


@pytest.mark.parametrize("accuracies", [(85.5, 85), (85, 85.5)])
def test_an_accuracy_at_the_floor_fails(accuracies):
    assert verdicts(rows(accuracies=accuracies)) == [True, True, False, True]


def test_without_a_floor_there_is_no_such_line():
    assert [check.ok for check in compare.checks(rows(accuracies=(10, 10)), OPTIONS)] == [True, True, True]


def test_the_last_epochs_accuracy_counts():
    many = rows(accuracies=(10, 90)) + rows(accuracies=(90, 90))[-2:]
    assert verdicts(many)[1:3] == [True, True]


def test_memory_above_the_limit_fails(memory):
    memory[1] = 57
    assert verdicts(rows()) == [True, True, True, False]


def test_throughput_is_the_median_without_the_first_steps():
    timed = [
        {"variant": "fused", "seconds": seconds, "loss": 1.0}
        for seconds in [9.0] * compare.WARMUP_STEPS + [0.1, 0.2, 7.0]
    ] + [{"variant": "stock", "seconds": 1e-9, "loss": 1.0}]
    trainer = Trainer(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), OPTIONS, CPU)
    batch = (torch.randn(16, 1, 28, 28), torch.zeros(16, dtype=torch.int64))
    assert compare.costs("fused", trainer, OPTIONS, CPU, batch, timed).images_per_second == pytest.approx(16 / 0.2)


def test_bytes_per_image_are_measured_and_the_model_is_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10))
    trainer = Trainer(model, OPTIONS, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = (torch.randn(16, 1, 28, 28), torch.zeros(16, dtype=torch.int64))
    saved = compare.costs("fused", trainer, OPTIONS, CPU, batch, rows()).saved_per_image
    # The input and the normalised input, log-probabilities and the label; what batch norm and the loss keep for all 16
    # images is below a byte per image.
    assert saved == pytest.approx(2 * 784 * 4 + 10 * 4 + 8, abs=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_holds_the_table_the_pictures_and_the_conditions(tmp_path):
    metrics = rows(difference=1e-6)
    checks = compare.checks(metrics, OPTIONS)
    costs = {"stock": compare.Costs(2e6, 100.0), "fused": compare.Costs(1e6, 150.0)}
    conditions = {"device": "an abacus", "CPU threads": "3"}
    path = report.write(tmp_path, metrics, checks, costs, OPTIONS, "Fashion-MNIST", conditions)
    text = path.read_text()
    for part in ("an abacus", "2,000,000", "1,000,000", "0.500", "1.50", "--compare", "| ok |", "1.0e-06"):
        assert part in text
    for name in ("loss.png", "accuracy.png", "costs.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(PNG)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_a_run_of_two_equal_models_reports_no_difference(tmp_path, dataset_folder):
    dataset = data.FashionMNIST(dataset_folder, OPTIONS)
    trainers = {}
    for variant in ("stock", "fused"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
        trainers[variant] = Trainer(model, OPTIONS, CPU)
    run = Run(trainers, dataset, OPTIONS, tmp_path, CPU, console.Progress())
    assert run.train()
    assert compare.loss_differences(run.rows) == dict.fromkeys(range(1, 9), 0.0)
    assert [check.ok for check in compare.checks(run.rows, OPTIONS)] == [True, True, True]


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_is_printed_with_and_without_rich(rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    console.print_table("Title [x]", ["a", "b"], [["|loss| [bold]", "FAILED"], ["1", "ok"]])
    printed = capsys.readouterr().out
    for part in ("Title [x]", "|loss| [bold]", "FAILED", "ok"):
        assert part in printed
