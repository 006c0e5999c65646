import argparse
import dataclasses
import shlex

import pytest

from fastres.train import options
from fastres.train.errors import UserError
from fastres.train.options import DEMO, Options


def parse(line):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return vars(parser.parse_args(shlex.split(line)))


def test_nothing_given_is_all_defaults():
    assert parse("") == {}
    assert options.resolve({}) == dataclasses.replace(Options(), out=f"runs/{Options.model}")


def test_every_option_has_an_argument_that_sets_it():
    values = dataclasses.asdict(Options())
    changed = {name: not value if isinstance(value, bool) else value for name, value in values.items()}
    changed |= {"milestones": (0.25, 0.5), "epochs": 3, "lr": 0.3, "out": "here", "schedule": "step", "compare": False}
    given = parse(options.as_arguments({name: value for name, value in changed.items() if name != "compare"}))
    assert {"compare": False, **given} == changed


def test_an_argument_wins_over_the_demo_and_the_demo_over_the_default():
    chosen = options.resolve(parse("--demo --epochs 7"))
    assert chosen.epochs == 7 and chosen.compare and chosen.model == DEMO["model"]


def test_the_help_of_demo_says_what_it_stands_for():
    assert options.resolve(parse(options.as_arguments(DEMO))) == options.resolve(parse("--demo"))


def test_the_command_in_the_report_makes_the_same_run():
    chosen = options.resolve(parse("--compare --lr 0.3 --milestones 0.1,0.9 --schedule step --no-augment"))
    line = options.command(chosen)
    assert line.startswith("python -m fastres train --")
    assert options.resolve(parse(line.removeprefix("python -m fastres train "))) == chosen


def test_the_checkpoint_wins_over_the_default():
    saved = dataclasses.asdict(Options(lr=0.7, milestones=(0.1,), out="there"))
    assert options.resolve({}, saved) == Options(lr=0.7, milestones=(0.1,), out="there")
    assert options.resolve(parse("--lr 0.7 --milestones 0.1 --threads 2"), saved).threads == 2


@pytest.mark.parametrize("line", ["--lr 0.8", "--milestones 0.2", "--compare", "--no-augment", "--seed 1"])
def test_what_contradicts_the_checkpoint_is_refused(line):
    with pytest.raises(UserError, match=f"argument {line.split()[0]}: the checkpoint"):
        options.resolve(parse(line), dataclasses.asdict(Options(lr=0.7)))
