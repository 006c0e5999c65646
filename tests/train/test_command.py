"""`python -m fastres train` as a user runs it, on generated images and the smallest model."""

import signal

import pytest
import torch

from fastres.cli import main
from fastres.train import engine

MODEL = "cifar_resnet11_bottleneck"


@pytest.fixture
def train(dataset_folder, tmp_path, capsys):
    """Runs the command and returns its exit code, stdout and stderr."""

    def run(*arguments, out=tmp_path / "run", data=dataset_folder, batch=32):
        # What a resumed run takes from its checkpoint is given only to a new one.
        fixed = [] if "--resume" in arguments else ["--model", MODEL, "--batch", str(batch), "--threads", "1"]
        # On a CPU, whose numbers repeat.
        words = ["train", *fixed, "--device", "cpu", "--data", str(data), "--out", str(out), *map(str, arguments)]
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def parameters(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)["trainers"]


def test_compare_trains_both_and_writes_the_report(train, tmp_path):
    code, out, err = train("--compare", "--epochs", 1)
    assert code == 0, out + err
    assert "wrote" in out and "report.md" in out and "FAILED" not in out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "accuracy.png", "checkpoint.pt", "costs.png", "loss.png", "metrics.csv", "report.md",
    ]  # fmt: skip
    states = parameters(tmp_path / "run")
    assert list(states) == ["stock", "fused"]
    assert list(states["stock"]["model"]) == list(states["fused"]["model"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compare_on_a_gpu(dtype, train):
    _, out, err = train("--compare", "--epochs", 1, "--device", "cuda", "--dtype", dtype)
    assert "wrote" in out and "report.md" in out, out + err
    # One of the 24 test images is four points of accuracy, more than the two may lie apart.
    assert all("accuracy" in line for line in out.splitlines() if "FAILED" in line), out


def test_a_failed_check_exits_with_1(train):
    code, out, _ = train("--compare", "--epochs", 1, "--min-accuracy", 100)
    assert code == 1
    assert "FAILED" in out


def test_the_demo_is_a_preset_that_arguments_override(train, tmp_path):
    code, out, err = train("--demo", "--epochs", 1, "--min-accuracy", 0, "--train-images", 64)
    assert code == 0, out + err
    assert list(parameters(tmp_path / "run")) == ["stock", "fused"]
    assert train("--demo", "--epochs", 1, "--min-accuracy", 0, "--train-images", 64)[0] == 0  # a second one replaces it


@pytest.mark.parametrize(("backend", "variant"), [("stock", "stock"), ("reference", "fused")])
def test_one_model_trains_alone(backend, variant, train, tmp_path):
    code, out, _ = train("--backend", backend, "--epochs", 1)
    assert code == 0 and f"test accuracy: {variant}" in out
    assert list(parameters(tmp_path / "run")) == [variant]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_and_the_hint_resumes_to_the_same_numbers(number, code, train, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train("--epochs", 2, out=whole)[0] == 0
    step = engine.Trainer.step
    calls = []

    def step_and_interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return step(*arguments)

    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    monkeypatch.setattr(engine.Trainer, "step", step_and_interrupt)
    got, out, err = train("--epochs", 2, out=stopped)
    assert got == code and len(calls) == 3
    assert f"python -m fastres train --resume {stopped}/checkpoint.pt" in out and "saving" in err
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    got, out, err = train("--resume", stopped / "checkpoint.pt", out=stopped)
    assert got == 0, out + err
    for one, other in zip(
        parameters(whole)["fused"]["model"].items(), parameters(stopped)["fused"]["model"].items(), strict=True
    ):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def test_a_second_interrupt_ends_at_once(train, monkeypatch):
    def step(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        for _ in range(100_000):  # Python 3.10 looks for signals now and then only.
            pass

    monkeypatch.setattr(engine.Trainer, "step", step)
    assert train("--epochs", 1)[0] == 130


def test_resume_finds_the_checkpoint_and_continues_into_more_epochs(train, tmp_path):
    assert train("--epochs", 1)[0] == 0
    code, out, err = train("--resume", "--epochs", 2)
    assert code == 0 and "epoch 2/2" in out and "epoch 1/2" not in out, out + err


def test_a_run_is_not_overwritten_unasked(train):
    assert train("--epochs", 1)[0] == 0
    code, _, err = train("--epochs", 1)
    assert code == 2 and "argument --out" in err and "--resume" in err and "--overwrite" in err
    assert train("--epochs", 1, "--overwrite")[0] == 0


def one_line(err, *parts):
    assert err.count("\n") == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in err, err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "resnet5"], ["argument --model", "did you mean", "resnet50"]),
        (["--epochs", "-1"], ["argument --epochs", "'-1'", "at least 1"]),
        (["--epochs", "0"], ["argument --epochs", "at least 1"]),
        (["--batch", "many"], ["argument --batch", "'many'", "whole number"]),
        (["--batch", "1000"], ["argument --batch", "at most 64"]),
        (["--lr", "-0.1"], ["argument --lr", "at least 0"]),
        (["--lr", "nan"], ["argument --lr", "'nan'"]),
        (["--label-smoothing", "1"], ["argument --label-smoothing"]),
        (["--milestones", "0.5,x"], ["argument --milestones", "'x'"]),
        (["--dtype", "fp8"], ["argument --dtype", "fp8"]),
        (["--dtype", "fp16", "--device", "cpu"], ["argument --dtype", "needs a GPU", "bf16"]),
        (["--device", "toaster"], ["argument --device", "toaster"]),
        (["--backend", "magic"], ["argument --backend", "magic"]),
        (["--backend", "stock", "--compare"], ["argument --backend", "nothing to compare"]),
        (["--nesterov", "--momentum", "0"], ["argument --nesterov", "--momentum"]),
        (["--min-accuracy", "101"], ["argument --min-accuracy", "0 to 100"]),
        (["--epoch", "1"], ["--epoch"]),
        (["--resume", "/nowhere/checkpoint.pt"], ["argument --resume", "/nowhere/checkpoint.pt"]),
        (["--dataset", "folder"], ["argument --data", "is not a folder", "DIR/train/CLASS"]),
        (["--model", "resnet18", "--width", "8"], ["argument --width", "resnet18"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(arguments, parts, train):
    code, _, err = train(*arguments)
    assert code == 2
    one_line(err, *parts)


def test_unreadable_data_is_one_line(train, own_dataset_folder):
    (own_dataset_folder / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    code, _, err = train("--epochs", 1, data=own_dataset_folder)
    assert code == 2
    one_line(err, "argument --data", "train-images-idx3-ubyte.gz", "delete it")


def test_missing_data_is_one_line(train, tmp_path):
    code, _, err = train("--offline", data=tmp_path / "nowhere")
    assert code == 2
    one_line(err, "argument --data", "--offline")


def test_an_unknown_model_is_reported_before_any_data_is_looked_for(train, tmp_path):
    code, _, err = train("--offline", "--model", "resnet5", data=tmp_path / "nowhere")
    assert code == 2
    one_line(err, "argument --model")


def test_an_output_folder_that_cannot_be_written_is_one_line(train, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = train(out=tmp_path / "file" / "run")
    assert code == 2
    one_line(err, "argument --out", "cannot be written")


def test_a_damaged_checkpoint_is_one_line(train, tmp_path):
    assert train("--epochs", 1)[0] == 0
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = train("--resume")
    assert code == 2
    one_line(err, "argument --resume", "damaged")


@pytest.mark.parametrize(("flag", "value"), [("--lr", 0.5), ("--model", "cifar_resnet20"), ("--milestones", "0.1,0.2")])
def test_what_contradicts_the_checkpoint_is_refused(flag, value, train):
    assert train("--epochs", 1)[0] == 0
    code, _, err = train("--resume", flag, value)
    assert code == 2
    one_line(err, f"argument {flag}", "checkpoint")


def test_the_loss_that_is_not_finite_is_one_line(train):
    code, _, err = train("--epochs", 1, "--lr", "1e38", "--warmup", 0)
    assert code == 2
    one_line(err, "argument --lr", "smaller --lr")
