import json
import os
import subprocess
import sys

import pytest

from fastres.cli import main


def run(capsys, *arguments):
    try:
        code = main(list(arguments))
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", ["info", "inspect", "explain", "report", "train", "verify"])
def test_every_command_has_help_with_examples(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"  python -m fastres {command}" in out.partition("examples:")[2]
    code, out, _ = run(capsys, "--help")
    assert code == 0 and command in out


def test_info_names_every_backend_and_why_not(capsys):
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert {"reference", "library", "triton", "projection"} <= set(facts["backends"])
    assert facts["backends"]["reference"] is None
    assert facts["versions"]["torch"] and facts["devices"]["cpu"]
    assert facts["extension"]["available"] == facts["backends"]["projection"]
    code, out, _ = run(capsys, "info")
    assert code == 0
    for name, reason in facts["backends"].items():
        assert name in out and (reason is None or reason.split()[0] in out)


def test_explain_names_the_blocks_of_a_model(capsys):
    code, out, err = run(capsys, "explain", "cifar_resnet11_bottleneck")
    assert code == 0, err
    assert all(name in out for name in ("layer1.0", "layer2.0", "layer3.0"))


def test_explain_follows_an_input_through_the_model(capsys):
    code, out, err = run(capsys, "explain", "cifar_resnet11_bottleneck", "--input", "2,1,28,28")
    assert code == 0, err
    assert all(shape in out for shape in ("2x1x28x28", "2x64x28x28", "2x128x14x14"))
    assert "A training step of (2, 1, 28, 28) in bfloat16" in out
    assert "Gram-folded" in out and "for bf16 activations" in out.splitlines()[0]


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("pipe", ["explain cifar_plain20 | true", "explain resnet50 --input 1,3,64,64 | head -1"])
def test_a_reader_that_has_read_enough_ends_a_command_in_silence(pipe, unbuffered):
    """Whether it is gone before the first line or after it."""
    command = f"set -o pipefail; {sys.executable} -m fastres {pipe}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_failed_check_stays_one_when_its_reader_is_gone():
    code = "import sys, fastres.cli as c; c._info = lambda a: print('failed') or 1; sys.exit(c.main(['info']))"
    pipe = f'set -o pipefail; {sys.executable} -c "{code}" | true'
    done = subprocess.run(
        ["bash", "-c", pipe], capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""}
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_a_broken_pipe_that_is_not_the_outputs_is_no_silence(monkeypatch, capsys):
    def broken(arguments):
        raise BrokenPipeError("a worker died")

    monkeypatch.setattr("fastres.cli._info", broken)
    with pytest.raises(BrokenPipeError, match="a worker died"):
        main(["info"])


def test_explain_counts_a_training_step_of_a_batch(capsys):
    code, out, err = run(capsys, "explain", "resnet18", "--batch", "4", "--part", "rtx4090", "--dtype", "fp16")
    assert code == 0, err
    assert "A training step of (4, 3, 224, 224) in float16" in out and "GeForce RTX 4090" in out
    for total in ("stock eager, counted", "the plan that runs today, counted", "the complete plan, modelled"):
        assert f"\n{total} " in out
    assert "training step" not in run(capsys, "explain", "resnet18")[1]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND"]),
        (["explode"], ["explode", "explain"]),
        (["explain"], ["MODEL"]),
        (["explain", "resnet5"], ["argument MODEL", "did you mean", "resnet50"]),
        (["explain", "resnet18", "--input", "8,3,224"], ["argument --input", "8,3,224,224"]),
        (["explain", "resnet18", "--input", "8,0,9,9"], ["argument --input", "8,0,9,9"]),
        (["explain", "resnet18", "--batch", "0"], ["argument --batch", "'0'", "at least 1"]),
        (["explain", "resnet18", "--batch", "8", "--input", "8,3,9,9"], ["--input", "not allowed with", "--batch"]),
        (["explain", "resnet18", "--part", "h20"], ["argument --part", "h200", "rtx4090"]),
        (["info", "--loud"], ["--loud"]),
        (["report"], ["RESULTS"]),
        (["report", "no/such/file.json"], ["argument RESULTS", "no/such/file.json"]),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, parts, capsys):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_help_comes_without_torch():
    script = """
import sys, fastres.cli
try:
    fastres.cli.main(["train", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastres", "train", "--epochs", "-3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m fastres train: error: argument --epochs: '-3'")
