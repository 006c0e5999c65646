import csv
import dataclasses

import pytest
import torch
from torch import nn

from fastres.train import checkpoint, console, data, metrics
from fastres.train.engine import Run, Trainer, resolve_device
from fastres.train.errors import UserError
from fastres.train.options import Options

CPU = torch.device("cpu")
OPTIONS = Options(epochs=4, batch=16, lr=0.05, warmup=0.5, nesterov=True, label_smoothing=0.1)  # 4 steps an epoch


def network(seed=0):
    """Dropout draws from the global generator, so that a resumed run needs its state."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def make_run(folder, dataset_folder, options=OPTIONS, variants=("stock", "fused")):
    folder.mkdir(exist_ok=True)
    dataset = data.FashionMNIST(dataset_folder, options)
    trainers = {name: Trainer(network(), options, CPU) for name in variants}
    return Run(trainers, dataset, options, folder, CPU, console.Progress())


def after(steps):
    """A `stop` that says yes when it has been asked so often."""
    answers = iter([False] * (steps - 1) + [True])
    return lambda: next(answers)


def results(run):
    """All that a run computed."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in run.rows]
    return rows, {name: trainer.state_dict() for name, trainer in run.trainers.items()}


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, dataset_folder):
    torch.set_num_threads(1)
    run = make_run(tmp_path_factory.mktemp("whole"), dataset_folder)
    assert run.train()
    return results(run)


# An epoch asks after each of its 4 steps, then before each of the 2 test batches of both models.
@pytest.mark.parametrize("stop_at", [1, 4, 5, 8, 10, 12, 15])
def test_a_stopped_run_resumes_to_the_same_numbers(stop_at, tmp_path, dataset_folder, whole_run):
    first = make_run(tmp_path, dataset_folder)
    assert not first.train(after(stop_at))
    torch.manual_seed(99)
    second = make_run(tmp_path, dataset_folder)
    second.load(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert second.train()
    assert_same(list(results(second)), list(whole_run))


def test_a_run_stopped_twice_resumes_to_the_same_numbers(tmp_path, dataset_folder, whole_run):
    make_run(tmp_path, dataset_folder).train(after(3))
    for stop in (after(4), lambda: False):
        run = make_run(tmp_path, dataset_folder)
        run.load(checkpoint.load(tmp_path / "checkpoint.pt"))
        finished = run.train(stop)
    assert finished
    assert_same(list(results(run)), list(whole_run))


@pytest.mark.parametrize("half_a_row", ["", "s", "fused,2,", "fused,2,9,0.1,9."])
def test_rows_written_after_the_checkpoint_are_dropped(half_a_row, tmp_path, dataset_folder, whole_run):
    make_run(tmp_path, dataset_folder).train(after(10))
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(f"stock,2,7,0.1,9.9,0.1,,\nfused,2,8,,,,9.9,10.0\n{half_a_row}")
    run = make_run(tmp_path, dataset_folder)
    run.load(checkpoint.load(tmp_path / "checkpoint.pt"))
    run.train()
    assert_same(list(results(run)), list(whole_run))


@pytest.mark.parametrize("content", ["a,b\n1,2\n", ",".join(metrics.COLUMNS) + "\nstock,one,1,,,,,\n"])
def test_a_file_that_is_no_metrics_is_refused(content, tmp_path):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(UserError, match="argument --out: .*metrics.csv"):
        metrics.read(tmp_path / "metrics.csv", 1, 1)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, dataset_folder):
    options = dataclasses.replace(OPTIONS, epochs=1)
    run = make_run(tmp_path, dataset_folder, options)
    run.train()
    again = make_run(tmp_path, dataset_folder, options)
    again.load(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert again.train()
    assert_same(list(results(again)), list(results(run)))


def test_metrics_csv_holds_a_row_per_step_and_per_epoch(tmp_path, dataset_folder):
    run = make_run(tmp_path, dataset_folder, variants=("fused",))
    run.train()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == metrics.COLUMNS
    steps = [row for row in rows if row["loss"]]
    tests = [row for row in rows if row["test_accuracy"]]
    assert [int(row["step"]) for row in steps] == list(range(1, 17))
    assert [(int(row["epoch"]), int(row["step"])) for row in tests] == [(1, 4), (2, 8), (3, 12), (4, 16)]
    assert all(row["lr"] and row["seconds"] and not row["test_loss"] for row in steps)
    assert [float(row["loss"]) for row in steps] == [row["loss"] for row in run.rows if "loss" in row]
    assert metrics.read(tmp_path / "metrics.csv", 4, 16) == run.rows


def test_the_learning_rate_of_each_step_is_the_schedules(tmp_path, dataset_folder):
    run = make_run(tmp_path, dataset_folder, dataclasses.replace(OPTIONS, schedule="step", warmup=0.5), ("fused",))
    run.train()
    rates = [row["lr"] for row in run.rows if "lr" in row]
    assert rates == pytest.approx([0.025, 0.05] + [0.05] * 6 + [0.005] * 4 + [0.0005] * 4)


def test_two_equal_models_side_by_side_stay_equal(tmp_path, dataset_folder):
    run = make_run(tmp_path, dataset_folder)
    for trainer in run.trainers.values():
        trainer.model[3].p = 0.0
    run.train()
    assert_same(run.trainers["stock"].state_dict(), run.trainers["fused"].state_dict())


def test_trainers_take_turns_in_going_first(tmp_path, dataset_folder):
    run = make_run(tmp_path, dataset_folder)
    run.train(after(4))
    assert [row["variant"] for row in run.rows] == ["stock", "fused", "fused", "stock"] * 2


def test_training_learns(tmp_path, dataset_folder):
    options = Options(epochs=4, batch=16, lr=0.1, augment=False)
    run = make_run(tmp_path, dataset_folder, options, ("fused",))
    run.train()
    accuracies = [row["test_accuracy"] for row in run.rows if "test_accuracy" in row]
    assert accuracies[-1] > 90 > accuracies[0]


def test_a_step_is_sgd_with_momentum_weight_decay_and_smoothing():
    options = Options(momentum=0.8, weight_decay=0.01, nesterov=True, label_smoothing=0.2)
    ours, reference = nn.Linear(6, 3), nn.Linear(6, 3)
    reference.load_state_dict(ours.state_dict())
    trainer = Trainer(nn.Sequential(nn.Flatten(), ours), options, CPU)
    velocity = {name: torch.zeros_like(value) for name, value in reference.named_parameters()}
    for lr in (0.1, 0.3):
        images, labels = torch.randn(5, 1, 2, 3), torch.tensor([0, 1, 2, 1, 0])
        loss = trainer.step(*trainer.place(images, labels), lr)
        log = reference(images.flatten(1)).log_softmax(1)
        target = 0.8 * nn.functional.one_hot(labels, 3) + 0.2 / 3
        expected = -(target * log).sum(1).mean()
        gradients = torch.autograd.grad(expected, list(reference.parameters()))
        torch.testing.assert_close(loss, expected.detach())
        with torch.no_grad():
            for (name, value), gradient in zip(reference.named_parameters(), gradients, strict=True):
                gradient = gradient + 0.01 * value
                velocity[name] = 0.8 * velocity[name] + gradient
                value -= lr * (gradient + 0.8 * velocity[name])
    torch.testing.assert_close(dict(ours.named_parameters()), dict(reference.named_parameters()))


def test_evaluation_weighs_images_equally_and_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    trainer = Trainer(model, Options(), CPU)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    images = torch.eye(3).view(3, 1, 1, 3) * 100
    right, wrong = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])
    loss, accuracy = trainer.evaluate([(images, right), (images[:1], wrong[:1])])
    assert accuracy == 75.0
    assert loss == pytest.approx(100 / 4, rel=1e-4)
    assert_same(dict(trainer.model.state_dict()), before)


def test_bf16_trains_float32_parameters():
    seen = []
    model = network()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer = Trainer(model, Options(dtype="bf16"), CPU)
    loss = trainer.step(*trainer.place(torch.randn(4, 1, 28, 28), torch.arange(4)), 0.1)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_batches_come_in_the_memory_format(memory_format):
    trainer = Trainer(nn.Conv2d(3, 4, 3), Options(memory_format=memory_format), CPU)
    images, _ = trainer.place(torch.randn(2, 3, 5, 5), torch.zeros(2, dtype=torch.int64))
    wanted = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[memory_format]
    assert images.is_contiguous(memory_format=wanted)
    assert trainer.model.weight.is_contiguous(memory_format=wanted)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, dataset_folder):
    run = make_run(tmp_path, dataset_folder, dataclasses.replace(OPTIONS, lr=1e30))
    with pytest.raises(UserError, match="argument --lr: the (stock|fused) model's loss became"):
        run.train()


def test_another_models_checkpoint_is_refused_and_the_metrics_kept(tmp_path, dataset_folder):
    make_run(tmp_path, dataset_folder).train(after(2))
    before = (tmp_path / "metrics.csv").read_bytes()
    run = make_run(tmp_path, dataset_folder)
    run.trainers["fused"] = Trainer(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), OPTIONS, CPU)
    with pytest.raises(UserError, match="argument --resume: the checkpoint does not fit") as error:
        run.load(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert "\n" not in str(error.value)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_checkpoint_without_one_of_the_models_is_refused(tmp_path, dataset_folder):
    make_run(tmp_path, dataset_folder, variants=("fused",)).train(after(2))
    with pytest.raises(UserError, match="argument --resume: the checkpoint does not fit"):
        make_run(tmp_path, dataset_folder).load(checkpoint.load(tmp_path / "checkpoint.pt"))


def test_a_checkpoint_from_more_data_is_refused(tmp_path, dataset_folder):
    make_run(tmp_path, dataset_folder).train(after(3))
    with pytest.raises(UserError, match="argument --data"):
        make_run(tmp_path, dataset_folder, dataclasses.replace(OPTIONS, train_images=32)).load(
            checkpoint.load(tmp_path / "checkpoint.pt")
        )


@pytest.mark.parametrize(
    ("device", "dtype", "argument"),
    [("cpu", "fp16", "dtype"), ("toaster", "fp32", "device"), ("meta", "fp32", "device")],
)
def test_a_device_that_cannot_train_is_refused(device, dtype, argument):
    with pytest.raises(UserError, match=f"argument --{argument}: "):
        resolve_device(device, dtype)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        missing, remedy = f"cuda:{torch.cuda.device_count()}", "give cuda:0"
    else:
        missing, remedy = "cuda", "give --device cpu"
    with pytest.raises(UserError, match=f"argument --device: .*{remedy}"):
        resolve_device(missing, "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_trains_and_resumes_on_a_gpu(dtype, tmp_path, dataset_folder):
    device = torch.device("cuda")
    options = dataclasses.replace(OPTIONS, dtype=dtype)
    for stop in (after(6), lambda: False):
        trainers = {name: Trainer(network(), options, device) for name in ("stock", "fused")}
        run = Run(trainers, data.FashionMNIST(dataset_folder, options), options, tmp_path, device, console.Progress())
        if (tmp_path / "checkpoint.pt").exists():
            run.load(checkpoint.load(tmp_path / "checkpoint.pt"))
        finished = run.train(stop)
    assert finished
    assert [row["step"] for row in run.rows if row["variant"] == "fused" and "loss" in row] == list(range(1, 17))
    assert all(row["seconds"] > 0 for row in run.rows if "seconds" in row)
