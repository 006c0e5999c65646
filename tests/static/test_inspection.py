"""What is wrong with a compiled kernel is found; what a known compiler bug explains is tolerated while it lasts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re

import pytest

from fastres import info, inspection, static_checks
from fastres.cli import main
from fastres.inspection import KnownBug
from fastres.static_checks import Request

REQUEST = Request("planted", "bfloat16", (("n", 1),))


@pytest.mark.parametrize(
    "name, part, expected",
    [
        ("spills", 80, [r"\d+ spilling instructions", r"a stack frame of \d+ bytes"]),
        ("spills", 90, [r"\d+ spilling instructions", r"a stack frame of \d+ bytes"]),
        ("too many stages", 80, ["262144 bytes of shared memory, at most 166912 are allowed"]),
        ("too many stages", 90, ["294912 bytes of shared memory, at most 232448 are allowed"]),
        ("too few rows for HGMMA", 90, [r"16-bit matrices multiplied by \d+ HMMA, not by HGMMA"]),
        ("too few rows for HGMMA", 100, [r"16-bit matrices multiplied by \d+ HMMA, not by tcgen05"]),
        ("rows in 32 bits", 90, ["2 accesses with rows addressed in 32 bits: .*tt.load"]),
        ("a loop downwards", 90, ["1 loops that may never run once compiled: .*scf.for"]),
        ("refused", 90, [r"does not compile: CompileTimeAssertionFailure: (.|\n)*planted"]),
        ("crash", 90, ["does not compile: the compiler ended by SIGKILL"]),
    ],
)
def test_what_is_wrong_is_found(name, part, expected, planted):
    found = inspection.problems(planted(name, part))
    assert len(found) == len(expected)
    assert all(re.match(pattern, problem) for pattern, problem in zip(expected, found, strict=True)), found


@pytest.mark.parametrize("part", [80, 90, 100])
@pytest.mark.parametrize(
    "name", ["rows in 64 bits", "a loop upwards", "operands in shared memory", "operand in registers", "float32"]
)
def test_nothing_is_found_where_nothing_is_wrong(name, part, planted):
    assert inspection.problems(planted(name, part)) == []


def test_hmma_is_right_on_parts_that_have_nothing_better(planted):
    assert inspection.problems(planted("too few rows for HGMMA", 80)) == []


def test_tensor_memory_has_a_limit(planted):
    figures = dataclasses.replace(planted("rows in 64 bits", 90), part=100, tensor_memory=768)
    assert inspection.problems(figures) == ["768 columns of tensor memory, an SM has 512"]


# Known compiler bugs


@pytest.fixture
def bug():
    return KnownBug(
        kernel="accumulators_that_do_not_fit",
        part=90,
        triton=info.version("triton"),
        launch="^planted.*; bfloat16; .*SIZE 128",
        problem="spilling|stack frame",
        reason="planted",
    )


@pytest.fixture
def compiled_planted(planted):
    """`compiled_planted(*names)`: figures as `static_checks.figures` gives them."""

    def get(*names):
        return {(dataclasses.replace(REQUEST, case=f"planted {i}"), 90): [planted(n, 90)] for i, n in enumerate(names)}

    return get


def test_a_known_bug_is_tolerated(bug, planted):
    failures, known = inspection.judge(REQUEST, planted("spills", 90), (bug,))
    assert failures == [] and known == inspection.problems(planted("spills", 90))
    assert inspection.outdated({(REQUEST, 90): [planted("spills", 90)]}, (bug,)) == []


@pytest.mark.parametrize(
    "change",
    [{"kernel": "product"}, {"part": 80}, {"triton": "3.5."}, {"launch": "float32"}, {"launch": "SIZE 64"}],
    ids=str,
)
def test_a_known_bug_explains_nothing_elsewhere(change, bug, planted):
    failures, known = inspection.judge(REQUEST, planted("spills", 90), (dataclasses.replace(bug, **change),))
    assert len(failures) == 2 and known == []


def test_a_known_bug_explains_no_other_problem(bug, planted):
    bugs = (dataclasses.replace(bug, problem="spilling"),)
    failures, known = inspection.judge(REQUEST, planted("spills", 90), bugs)
    assert len(known) == 1 and len(failures) == 1 and "stack frame" in failures[0]


def test_a_known_bug_that_passes_is_reported(bug, planted):
    mended = dataclasses.replace(planted("spills", 90), instructions={}, stack=0)
    (told,) = inspection.outdated({(REQUEST, 90): [mended]}, (bug,))
    assert "starts to pass" in told and bug.kernel in told


def test_a_known_bug_that_no_launch_can_have_is_reported(bug, compiled_planted):
    (told,) = inspection.outdated(compiled_planted("rows in 64 bits"), (bug,))
    assert "matches no launch" in told


@pytest.mark.parametrize("change", [{"part": 100}, {"triton": "3.5."}], ids=str)
def test_a_known_bug_of_another_part_or_version_is_not_asked_for(change, bug, compiled_planted):
    assert inspection.outdated(compiled_planted("rows in 64 bits"), (dataclasses.replace(bug, **change),)) == []


def test_the_table_of_known_bugs_holds_what_fails_today(all_parts, compiled):
    if not all_parts:
        pytest.skip("an entry may be of a part or a dtype that is compiled for with --all-parts only")
    every = [compiled(family) for family in inspection.cases.BY_FAMILY]
    assert inspection.outdated({key: rows for family in every for key, rows in family.items()}) == []


# The command


@pytest.fixture
def inspected(capsys, monkeypatch, compiled_planted):
    """`inspected(names, *arguments)`: the command's code and output, when the planted kernels are all there are."""

    def run(names, *arguments):
        monkeypatch.setattr(static_checks, "figures", lambda *_: compiled_planted(*names))
        code = main(["inspect", "--part", "90", *arguments])
        return code, capsys.readouterr().out

    return run


def test_a_clean_kernel_gives_code_0_and_a_line(inspected):
    code, out = inspected(["operands in shared memory", "operand in registers"])
    assert code == 0 and "2 of 2 launches of 2 cases are clean" in out
    # One line for both: the configurations differ by a flag only.
    assert out.count("BM 128") == 1 and "0-4" in out and "HGMMA" in out and "TMA" not in out


def test_a_faulty_kernel_gives_code_1_and_is_named_with_its_case(inspected):
    code, out = inspected(["spills", "rows in 64 bits", "refused"])
    assert code == 1 and "1 of 3 launches of 3 cases are clean" in out
    assert re.search(
        r"FAILED accumulators_that_do_not_fit, sm_90, planted 0; bfloat16; n 1: \d+ spilling", out.replace("\n", " ")
    )
    assert "FAILED refused, sm_90, planted 2" in out


def test_a_known_bug_gives_code_0_while_it_lasts_and_1_after(inspected, monkeypatch, bug):
    monkeypatch.setattr(inspection, "KNOWN_COMPILER_BUGS", (bug,))
    code, out = inspected(["spills"])
    assert code == 0 and "known compiler bug accumulators_that_do_not_fit" in out and "FAILED" not in out
    code, out = inspected(["rows in 64 bits"])
    assert code == 1 and "matches no launch" in out
    # Asked for other kernels only, the entry is none of this call's business.
    assert inspected(["rows in 64 bits"], "--family", "batch_norm")[0] == 0


def test_json_holds_every_launch(inspected):
    code, out = inspected(["spills", "rows in 64 bits"], "--json")
    content = json.loads(out)
    assert code == 1 and content["triton"] == info.version("triton") and content["outdated"] == []
    spilled, clean = content["launches"]
    assert spilled["verdict"] == "FAILED" and spilled["spills"] > 0 and spilled["failures"]
    assert clean["verdict"] == "ok" and clean["failures"] == [] and clean["widths"] == [128]
    assert clean["case"] == "planted 1" and clean["sizes"] == {"n": 1} and clean["kernel"] == "rows_in_64_bits"


def test_shipped_kernels_of_a_part_by_the_name_of_a_gpu(capsys, planted):
    assert main(["inspect", "--part", "H200", "sm_90", "--kernel", "bn_bwd_reduce", "--json"]) == 0
    launches = json.loads(capsys.readouterr().out)["launches"]
    assert {launch["part"] for launch in launches} == {90}
    # Of every case that calls it, all kernels.
    assert {"_bn_bwd_reduce_kernel", "_bn_bwd_finalize_kernel"} <= {launch["kernel"] for launch in launches}
    assert "_bn_act_kernel" not in {launch["kernel"] for launch in launches}
    assert {launch["dtype"] for launch in launches} == {"bfloat16", "float16", "float32"}
    # Once for both names. The small kernels run twice in some cases, for two branches.
    reduces = [json.dumps(launch) for launch in launches if launch["kernel"] == "_bn_bwd_reduce_kernel"]
    assert len(set(reduces)) == len(reduces) > 10


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--part", "91"], ["argument --part", "'91'", "90", "h200"]),
        (["--family", "pooling"], ["argument --family", "'pooling'", "batch_norm"]),
        (["--family", "projection"], ["argument --family", "'projection'", "batch_norm"]),
        (["--kernel", "bn_apply"], ["argument --kernel", "'bn_apply'", "bn_bwd_apply"]),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, parts, capsys):
    pytest.importorskip("triton", reason="triton is not installed")
    assert main(["inspect", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_without_triton_the_command_says_what_to_install(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert main(["inspect"]) == 2
    assert "triton is not installed; pip install" in capsys.readouterr().err
