"""What a run writes, and how several runs into one folder add up."""

import itertools
import math

import pytest
import torch

from fastres.measure import conditions, results, roofline, session, timing
from fastres.measure.experiment import Experiment, Ready, Variant
from fastres.measure.gate import REFERENCE
from fastres.measure.results import Roofline
from fastres.measure.session import Session

SETTINGS = timing.Settings(burst=0.0, samples=2, limit=10.0, warmup=0.0, first=1, window=1)


@pytest.fixture
def facts(monkeypatch):
    """The conditions that are found; the roofline rises by 1 with every run."""
    facts = {"device": "a GPU", "commit": "abc", "date": "today"}
    rates = itertools.count(1.0)
    monkeypatch.setattr(conditions, "gather", lambda device: dict(facts))
    monkeypatch.setattr(
        roofline, "measure", lambda device, dtypes, clock: Roofline(10 - next(rates), {str(dtypes[0]): 5.0})
    )
    return facts


def start(folder, budget=math.inf, dtype=torch.float32):
    return Session(folder, torch.device("cpu"), [dtype], budget)


def experiment(name, seconds=1.0, variants=("fastres", "eager")):
    def call():
        pass

    ready = Variant(lambda: Ready({"call": call}, REFERENCE))
    return Experiment(
        "kernels", name, ("call",), (2, 4, 4, 8), torch.float32, 2, dict.fromkeys(variants, ready), SETTINGS
    )


def names(folder):
    return [(row.name, row.variant) for row in results.read(folder).rows]


def test_rows_are_saved_after_every_experiment(facts, tmp_path):
    run = start(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run.run(experiment("a"))
    assert names(tmp_path / "out") == [("a", "fastres"), ("a", "eager")]
    run.run(experiment("b"))
    assert len(names(tmp_path / "out")) == 4
    assert results.read(tmp_path / "out").conditions == facts


def test_a_second_run_replaces_its_rows_and_keeps_the_others(facts, tmp_path):
    first = start(tmp_path)
    first.run(experiment("a"))
    first.run(experiment("b"))
    before = {row.key: row for row in results.read(tmp_path).rows}
    facts["date"] = "tomorrow"
    second = start(tmp_path, dtype=torch.bfloat16)
    second.run(experiment("b"))
    found = results.read(tmp_path)
    after = {row.key: row for row in found.rows}
    assert after.keys() == before.keys()
    assert {key[1] for key in after if after[key] is not before[key] and after[key] != before[key]} == {"b"}
    assert found.conditions["date"] == "tomorrow"
    assert found.roofline == Roofline(9.0, {"torch.float32": 5.0, "torch.bfloat16": 5.0})
    assert second.notes == [] and not (tmp_path / session.PREVIOUS).exists()


def test_results_of_other_conditions_are_put_aside(facts, tmp_path):
    start(tmp_path).run(experiment("a"))
    facts["commit"] = "def"
    run = start(tmp_path)
    run.run(experiment("b"))
    assert {name for name, _ in names(tmp_path)} == {"b"}
    assert [row.name for row in results.read(tmp_path / session.PREVIOUS).rows] == ["a", "a"]
    assert run.notes == [
        f"{tmp_path / 'results.json'} is now results.previous.json: it was measured under other conditions: "
        "commit abc, now def"
    ]


def test_a_file_that_is_no_result_file_is_put_aside(facts, tmp_path):
    (tmp_path / "results.json").write_text("hello")
    run = start(tmp_path)
    run.run(experiment("a"))
    assert (tmp_path / session.PREVIOUS).read_text() == "hello"
    assert "is not a result file" in run.notes[0]


def test_what_does_not_fit_in_the_time_is_noted_until_it_runs(facts, tmp_path):
    run = start(tmp_path, budget=5.0)
    assert run.run(experiment("a")) is None
    run.skip("a test", "no time left")
    skipped = results.read(tmp_path).skipped
    assert [line.split(": ")[0] for line in skipped] == ["kernels, a, call, 2x4x4x8, float32", "a test"]
    assert skipped[0].endswith("s left, it may take 10 s")
    again = start(tmp_path)
    again.unskip("a test")
    again.run(experiment("a"))
    assert results.read(tmp_path).skipped == []


def test_the_clocks_of_the_end_are_added(facts, tmp_path, monkeypatch):
    run = start(tmp_path)
    assert run.finish() is None
    facts["clocks"] = "SM 1980 MHz"
    run.run(experiment("a"))
    monkeypatch.setattr(conditions, "clocks", lambda device: "SM 1755 MHz")
    assert run.finish().conditions["clocks"] == "SM 1980 MHz before, 1755 MHz after; as found, not locked"
    assert results.read(tmp_path).conditions["clocks"].startswith("SM 1980 MHz before")
