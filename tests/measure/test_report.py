"""Reports of result files. All figures here are made up."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastres.cli import main
from fastres.measure import analysis, comparison, report
from fastres.measure import results as result_files
from fastres.measure.results import Results, ResultsError, Roofline, Row

PNG = b"\x89PNG\r\n\x1a\n"
CONDITIONS = {"device": "an abacus", "torch": "2.11.0", "date": "2030-01-01", "commit": "0123abc"}
ROOFLINE = Roofline(copy=1e12, gemm={"bfloat16": 1e14})
MODELLED = {"stock eager": 473e6, "the plan of today": 268e6, "the complete plan": 181e6}


def row(group, name, phase, variant, seconds=None, spread=0.01, **more):
    """Timed rows have p20 and p80 that lie `spread` of the median apart."""
    shape = {"models": (4, 3, 32, 32), "units": (4, 64, 8, 8), "kernels": (4, 8, 8, 64)}[group]
    if seconds is not None:
        more = {"p20": seconds * (1 - spread / 2), "p80": seconds * (1 + spread / 2), "samples": 9} | more
    return Row(group, name, phase, variant, shape, "bfloat16", 4, seconds=seconds, **more)


def step(variant, seconds=None, name="resnet50", **more):
    return row("models", name, "step", variant, seconds, **more)


def kernel(variant, seconds=None, name="bn_act", **more):
    return row("kernels", name, "call", variant, seconds, **more)


def everything():
    """A run with something of each kind: rows of every group, one refusal, one skip."""
    times = {"eager NCHW": 0.080, "eager channels_last": 0.040, "compile default": 0.032, "compile max-autotune": 0.025}
    times |= {"fastres library": 0.050, "fastres": 0.020}
    rows = [step(variant, seconds, bytes=10**9, flops=10**11) for variant, seconds in times.items()]
    rows.append(step("compile reduce-overhead", refused="CUDA graphs need a GPU"))
    for variant, seconds in (("eager channels_last", 0.012), ("fastres", 0.016)):
        rows.append(row("models", "resnet50", "inference", variant, seconds))
    for variant, seconds in (("eager channels_last", 0.010), ("fastres", 0.005)):
        for phase, part in (("forward", 0.3), ("backward", 0.6), ("optimizer", 0.1)):
            rows.append(row("models", "resnet50", phase, variant, 4 * part * seconds))
    for variant, saved, peak in (("eager channels_last", 8e6, 16e6), ("fastres", 4e6, 12e6)):
        more = {"saved_bytes": int(saved), "peak_memory": int(peak)}
        rows.append(row("units", "bottleneck", "forward", variant, 0.001, bytes=10**8, flops=10**9, **more))
    rows += [
        kernel("eager", 2e-6, bytes=10**6),
        kernel("fastres triton", 1.25e-6, bytes=10**6, backend="triton", gate="2 results, worst 38 % of the bound"),
        kernel("eager", 4e-6, "conv1x1", bytes=10**6, flops=10**8),
        kernel("fastres triton", 2e-6, "conv1x1", bytes=10**6, flops=10**8, backend="triton"),
        kernel("fastres triton", name="gram", backend="triton", refused="gate: sum is 312 % of\nthe bound"),
    ]
    return Results(dict(CONDITIONS), ROOFLINE, rows, ["resnet152: did not fit into the budget"])


@pytest.fixture(autouse=True)
def modelled(monkeypatch):
    """What the cost model says, without running it; `modelled.update` and `modelled.clear` change it."""
    values = dict(MODELLED)
    monkeypatch.setattr(report, "modelled_traffic", lambda row: values)
    return values


def written(folder, results, baseline=None):
    return report.write(folder, results, baseline).read_text()


def cells(text, *begin):
    """The cells of the one table row that begins with these cells."""
    tables = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    (found,) = [line for line in tables if line[: len(begin)] == list(begin)]
    return found[len(begin) :]


def section(text, title):
    (found,) = [part for part in text.split("\n## ") if part.startswith(title)]
    return found


def test_a_report_has_every_section_and_picture(tmp_path):
    text = written(tmp_path / "made" / "here", everything())
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Conditions",
        "Slower than a baseline",
        "Refused",
        "Skipped",
        "Models: training step",
        "Models: inference",
        "Forward, backward, optimizer",
        "What each step bought: resnet50, batch 4, 32x32, bf16",
        "Memory of training, MB per image",
        "Units",
        "Kernels",
    ]
    pictures = {path.name for path in (tmp_path / "made" / "here").glob("*.png")}
    assert pictures == {line.partition("](")[2][:-1] for line in text.splitlines() if line.startswith("![")}
    assert len(pictures) == 7
    for name in pictures:
        assert (tmp_path / "made" / "here" / name).read_bytes().startswith(PNG)


def test_every_table_is_whole(tmp_path):
    width = None
    for line in written(tmp_path, everything(), everything()).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        assert line.endswith("|")
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_what_was_not_measured_has_no_section(tmp_path):
    results = Results(CONDITIONS, None, [kernel("fastres", 1e-6)], [])
    text = written(tmp_path, results)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# fastres measured on an abacus",
        "## Conditions",
        "## Kernels",
    ]
    assert "roofline of this device was not measured" in text
    assert not list(tmp_path.glob("*.png"))
    assert "##" not in written(tmp_path, Results({}, None, [], [])).replace("## Conditions", "")


def test_conditions_and_roofline_are_told(tmp_path):
    text = section(written(tmp_path, everything()), "Conditions")
    assert cells(text, "device") == ["an abacus"]
    assert cells(text, "copy, bytes read and written") == ["1,000 GB/s"]
    assert cells(text, "GEMM, bfloat16") == ["100 TFLOP/s"]


def test_models_are_set_against_eager_and_the_best_compile(tmp_path):
    text = section(written(tmp_path, everything()), "Models: training step")
    name = "resnet50, batch 4, 32x32, bf16"
    assert cells(text, name, "fastres") == [
        *("200", "20.0 ms", "19.9 ms - 20.1 ms"),
        *("2.00x", "1.25x"),  # of eager channels_last and of compile max-autotune, the faster of two modes
        *("5 %", "-"),  # moving 1e9 bytes takes 1 ms, computing 1e11 FLOP as well
    ]
    assert cells(text, name, "eager NCHW")[3:5] == ["0.50x", "0.31x"]
    assert cells(text, name, "compile default")[0] == "125"


def test_what_is_slower_is_listed_worst_first(tmp_path):
    text = section(written(tmp_path, everything()), "Slower than a baseline")
    names = [line.split(" | ")[:4] for line in text.splitlines() if line.startswith("| resnet50")]
    assert [(line[1], line[3]) for line in names] == [("step", "fastres library"), ("inference", "fastres")]
    slow = cells(text, "resnet50", "step", "4x3x32x32 bf16", "fastres library")
    assert slow == [
        "50.0 ms",
        "compile max-autotune 25.0 ms (0.50x), compile default 32.0 ms (0.64x), eager channels_last 40.0 ms (0.80x)",
    ]
    # The unit takes exactly as long as eager: not slower.
    assert text.splitlines()[2].startswith("2 of 9 timed rows")


def test_where_nothing_is_slower_that_is_said(tmp_path):
    text = written(tmp_path, Results(CONDITIONS, None, [step("eager NCHW", 2.0), step("fastres", 1.0)], []))
    assert "0 of 1 timed rows of fastres are slower" in section(text, "Slower than a baseline")


def test_refused_and_skipped_are_named_with_their_reasons(tmp_path):
    text = written(tmp_path, everything())
    refused = section(text, "Refused")
    assert cells(refused, "gram", "call") == ["4x8x8x64 bf16", "fastres triton", "gate: sum is 312 % of the bound"]
    assert cells(refused, "resnet50", "step")[1:] == ["compile reduce-overhead", "CUDA graphs need a GPU"]
    assert "- resnet152: did not fit into the budget" in section(text, "Skipped")


def test_a_row_without_time_or_reason_is_named_too(tmp_path):
    text = written(tmp_path, Results(CONDITIONS, None, [step("fastres")], []))
    assert cells(section(text, "Refused"), "resnet50")[-1] == "no time was recorded"


def test_time_is_split_by_phase(tmp_path):
    text = section(written(tmp_path, everything()), "Forward, backward, optimizer")
    assert cells(text, "resnet50, batch 4, 32x32, bf16", "eager channels_last") == ["12.0 ms", "24.0 ms", "4.00 ms"]
    assert cells(text, "resnet50, batch 4, 32x32, bf16", "fastres") == ["6.00 ms", "12.0 ms", "2.00 ms"]


def test_the_waterfall_gives_each_gain_and_says_what_is_modelled(tmp_path):
    text = section(written(tmp_path, everything()), "What each step bought")
    assert cells(text, "eager channels_last") == ["40.0 ms", "-40.0 ms", "2.00x"]
    assert cells(text, "fastres library") == ["50.0 ms", "+10.0 ms", "0.80x"]
    assert cells(text, "fastres") == ["20.0 ms", "-30.0 ms", "2.50x"]
    assert cells(text, "modelled") == ["MB moved per image", "of stock"]
    assert cells(text, "the complete plan") == ["181.0", "0.383"]
    assert "compile" not in text


def test_a_model_that_the_cost_model_does_not_know_has_a_measured_waterfall_only(tmp_path, monkeypatch):
    monkeypatch.undo()
    rows = [step("eager NCHW", 2.0, "my_model"), step("fastres", 1.0, "my_model")]
    text = section(written(tmp_path, Results(CONDITIONS, None, rows, [])), "What each step bought")
    assert "Bytes are not modelled: my_model is no model of fastres.models." in text
    assert cells(text, "fastres") == ["1.00 s", "-1.00 s", "2.00x"]
    assert "of stock" not in text


def test_the_cost_model_is_asked_for_the_step_that_was_timed(monkeypatch):
    monkeypatch.undo()
    asked = []

    def training_step(model, input_shape, dtype, *, scheme):
        asked.append((type(model).__name__, model.stem.conv.weight.device.type, input_shape, str(dtype), scheme))
        return [scheme]

    bytes = {"stock": 800, "today": 400, "complete": 200}
    cost = SimpleNamespace(training_step=training_step, total=lambda steps: SimpleNamespace(bytes=bytes[steps[0]]))
    monkeypatch.setitem(sys.modules, "fastres.cost", cost)
    monkeypatch.setattr("fastres.cost", cost, raising=False)
    timed = dataclasses.replace(step("fastres", 1.0, "cifar_resnet20"), shape=(4, 1, 28, 28))
    assert report.modelled_traffic(timed) == {
        "stock eager": 200,
        "the plan of today": 100,
        "the complete plan": 50,
    }
    assert asked == [("CifarResNet", "meta", (4, 1, 28, 28), "torch.bfloat16", scheme) for scheme in bytes]


def test_the_cost_model_agrees_with_the_signature_that_the_report_uses(monkeypatch):
    monkeypatch.undo()
    traffic = report.modelled_traffic(step("fastres", 1.0, "cifar_resnet11_bottleneck"))
    assert list(traffic) == list(MODELLED)
    assert 0 < traffic["the complete plan"] < traffic["stock eager"]


def test_memory_is_told_per_image(tmp_path):
    text = section(written(tmp_path, everything()), "Memory of training")
    assert cells(text, "bottleneck, 4x64x8x8, bf16") == ["2.00", "1.00", "0.500", "4.00", "3.00", "0.750"]


def test_memory_of_one_side_only_has_no_ratio(tmp_path):
    rows = [step("fastres", 1.0, saved_bytes=4 * 10**6)]
    text = section(written(tmp_path, Results(CONDITIONS, None, rows, [])), "Memory of training")
    assert cells(text, "resnet50, batch 4, 32x32, bf16") == ["-", "1.00", "-", "-", "-", "-"]


def test_kernels_have_rates_and_shares_of_the_roofline(tmp_path):
    text = section(written(tmp_path, everything()), "Kernels")
    assert cells(text, "bn_act", "call", "4x8x8x64 bf16", "fastres triton") == [
        *("triton", "1.25 us", "1.24 us - 1.26 us", "800", "-", "80 %", "1.60x", "-"),
        "2 results, worst 38 % of the bound",
    ]
    assert cells(text, "conv1x1", "call", "4x8x8x64 bf16", "fastres triton")[3:7] == ["500", "50.0", "50 %", "2.00x"]


def test_kernels_are_set_against_the_library_and_have_their_notes(tmp_path):
    rows = [kernel("fastres library", 3e-6), kernel("fastres triton", 1e-6, note="never settled", gate="1 result")]
    rows = [dataclasses.replace(row, shape=(4, 8, 8, 64, 256)) for row in rows]
    results = Results(CONDITIONS, ROOFLINE, rows, [])
    text = section(written(tmp_path, results), "Kernels")
    assert cells(text, "bn_act", "call", "4x8x8x64 to 256 bf16", "fastres triton")[-3:] == [
        *("-", "3.00x", "1 result; never settled"),
    ]
    assert [row[-1] for row in report.summary(results)[1]] == ["-", "- (never settled)"]


def test_a_dtype_whose_roofline_was_not_measured_has_no_share(tmp_path):
    rows = [dataclasses.replace(kernel("fastres", 1e-6, bytes=10**5, flops=10**6), dtype="float32")]
    text = section(written(tmp_path, Results(CONDITIONS, ROOFLINE, rows, [])), "Kernels")
    assert cells(text, "bn_act")[7:10] == ["1.00", "-", "-"]


def test_without_matplotlib_there_are_no_pictures_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = written(tmp_path, everything())
    assert "Without pictures: the report's pictures need matplotlib" in text
    assert "![" not in text and not list(tmp_path.glob("*.png"))
    assert cells(section(text, "What each step bought"), "the complete plan")


# Against an earlier run


def compared(now, earlier):
    return comparison.compare(Results({}, None, now, []), Results({}, None, earlier, []))


@pytest.mark.parametrize(
    ("seconds", "spreads", "verdict"),
    [
        (1.029, (0.0, 0.0), "same"),
        (1.031, (0.0, 0.0), "slower"),
        (1.09, (0.1, 0.0), "same"),
        (1.09, (0.0, 0.1), "same"),
        (1.11, (0.0, 0.1), "slower"),
        (1 / 1.029, (0.0, 0.0), "same"),
        (1 / 1.031, (0.0, 0.0), "faster"),
        (1 / 1.09, (0.0, 0.1), "same"),
    ],
)
def test_a_change_counts_beyond_three_percent_and_the_spread_of_both(seconds, spreads, verdict):
    now, earlier = step("fastres", seconds, spread=spreads[0]), step("fastres", 1.0, spread=spreads[1])
    found = compared([now], [earlier])
    assert [change.verdict for change in found.changes] == [verdict]
    assert found.regressions == (verdict == "slower")


def test_rows_without_percentiles_have_the_smallest_noise():
    now, earlier = (dataclasses.replace(step("fastres", time), p20=None, p80=None) for time in (1.031, 1.0))
    assert compared([now], [earlier]).regressions == 1


def test_a_slower_baseline_is_no_regression_but_is_told(tmp_path):
    now, earlier = ([step("eager NCHW", time), step("fastres", 1.0)] for time in (2.0, 1.5))
    assert compared(now, earlier).regressions == 0
    text = written(tmp_path, Results(CONDITIONS, None, now, []), Results(CONDITIONS, None, earlier, []))
    moved = text.partition("### Baselines that moved")[2].partition("\n## ")[0]
    assert cells(moved, "resnet50", "step", "4x3x32x32 bf16", "eager NCHW")[:3] == ["1.50 s", "2.00 s", "+33.3 %"]
    assert "No regressions in 2 rows" in text


def test_a_row_that_lost_its_time_is_a_regression():
    found = compared([step("fastres", refused="gate: wrong")], [step("fastres", 1.0)])
    assert found.regressions == 1 and not found.vanished
    assert report.regression_rows(found)[0][-3] == "refused: gate: wrong"


def test_other_shapes_and_dtypes_are_other_measurements():
    then = step("fastres", 1.0)
    for change in ({"shape": (8, 3, 32, 32)}, {"dtype": "float16"}, {"variant": "fastres library"}):
        found = compared([dataclasses.replace(then, seconds=9.0, **change)], [then])
        assert not found.changes and not found.regressions
        assert len(found.appeared) == len(found.vanished) == 1


def test_regressions_are_marked_and_come_first(tmp_path):
    names = {"resnet18": 1.2, "resnet34": 1.5, "resnet50": 0.5, "resnet101": 1.01}
    now = [step("fastres", time, name) for name, time in names.items()] + [step("fastres", 1.0, "new")]
    earlier = [step("fastres", 1.0, name) for name in names] + [step("fastres", 1.0, "gone")]
    conditions = CONDITIONS | {"torch": "2.13.0", "commit": "4567def"}
    text = written(tmp_path, Results(conditions, None, now, []), Results(CONDITIONS, None, earlier, []))
    sections = [line for line in text.splitlines() if line.startswith("#")]
    assert sections[1] == "## Against an earlier run: date 2030-01-01, commit 0123abc"
    assert sections[2] == "### Regressions"
    marked = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| **REGRESSION**")]
    assert marked == ["resnet34", "resnet18"]
    assert cells(text, "**REGRESSION**", "resnet18")[3:] == ["1.00 s", "1.20 s", "+20.0 %", "3.0 %"]
    improved = text.partition("### Improvements")[2].partition("###")[0]
    assert cells(improved, "resnet50")[-2] == "-50.0 %" and "resnet101" not in improved
    assert "1 rows stayed within the noise" in text
    assert "| new |" in text.partition("### Timed only in this run")[2].partition("###")[0]
    assert "| gone |" in text.partition("### Timed only in the earlier run")[2].partition("###")[0]
    assert "**Warning: different torch** (2.11.0 earlier, 2.13.0 now)" in text
    assert cells(text, "commit", "0123abc") == ["4567def"]


@pytest.mark.parametrize(("name", "value"), [("device", "a slide rule"), ("torch", "2.13.0")])
def test_other_conditions_are_warned_of(name, value, tmp_path):
    earlier = everything()
    now = dataclasses.replace(earlier, conditions=CONDITIONS | {name: value})
    assert f"**Warning: different {name}**" in written(tmp_path, now, earlier)
    assert "Warning" not in written(tmp_path, earlier, everything())


def test_other_dtypes_are_warned_of(tmp_path):
    now = Results(CONDITIONS, None, [dataclasses.replace(step("fastres", 1.0), dtype="float16")], [])
    earlier = Results(CONDITIONS, None, [step("fastres", 1.0)], [])
    assert "**Warning: different dtypes** (bfloat16 earlier, float16 now)" in written(tmp_path, now, earlier)


# The table at the end of a run


def test_the_summary_has_a_row_for_each_of_ours_and_each_refusal():
    columns, rows = report.summary(everything())
    assert columns == report.SUMMARY_COLUMNS
    assert all(len(row) == len(columns) for row in rows)
    by_name = {(row[0], row[1], row[3]): row[4:] for row in rows}
    assert by_name["resnet50", "step", "fastres"] == ["20.0 ms", "200 img/s", "5 %", "1.25x"]
    assert by_name["resnet50", "step", "fastres library"][-1] == "0.50x"
    assert by_name["bn_act", "call", "fastres triton"] == ["1.25 us", "800 GB/s", "80 %", "1.60x"]
    assert by_name["gram", "call", "fastres triton"][0] == "refused"
    assert "312 %" in by_name["gram", "call", "fastres triton"][-1]
    assert by_name["resnet50", "step", "compile reduce-overhead"][-1] == "CUDA graphs need a GPU"
    assert ("resnet50", "step", "eager NCHW") not in by_name


def test_the_summary_shows_the_fastest_baseline_where_nothing_is_ours():
    _, rows = report.summary(Results({}, None, [step("eager NCHW", 2.0), step("compile default", 1.0)], []))
    assert [row[3:] for row in rows] == [["compile default", "1.00 s", "4.00 img/s", "-", "-"]]


# Several files


def stored(path, **changes):
    results = dataclasses.replace(everything(), **changes)
    result_files.write(path, results)
    return path


def test_files_of_one_device_are_one_run(tmp_path):
    first = stored(tmp_path / "first.json", rows=[step("fastres", 1.0), step("eager NCHW", 3.0)])
    conditions = CONDITIONS | {"commit": "4567def"}
    roofline = Roofline(copy=2e12, gemm={"bfloat16": 5e13, "float16": 1e13})
    rows = [step("fastres", 2.0), kernel("fastres", 1e-6)]
    second = stored(tmp_path / "second.json", rows=rows, conditions=conditions, roofline=roofline, skipped=["that"])
    merged = analysis.gather([first, second])
    assert [(row.name, row.variant, row.seconds) for row in merged.rows] == [
        ("resnet50", "fastres", 2.0),  # the file named last counts
        ("resnet50", "eager NCHW", 3.0),
        ("bn_act", "fastres", 1e-6),
    ]
    assert merged.conditions == CONDITIONS | {"commit": "0123abc; 4567def"}
    assert merged.roofline == Roofline(copy=2e12, gemm={"bfloat16": 1e14, "float16": 1e13})
    assert merged.skipped == ["resnet152: did not fit into the budget", "that"]
    assert analysis.gather([first, first]) == analysis.gather([first]) == result_files.read(first)


def test_files_of_two_devices_are_refused_by_name(tmp_path):
    first = stored(tmp_path / "first.json")
    second = stored(tmp_path / "second.json", conditions={"device": "a slide rule"})
    with pytest.raises(ResultsError) as error:
        analysis.gather([first, second])
    for part in (str(first), str(second), "an abacus", "a slide rule"):
        assert part in str(error.value)


# The command


def run(capsys, *arguments):
    try:
        code = main(["report", *map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_beside_the_results_and_prints_where(tmp_path, capsys):
    stored(tmp_path / "run" / result_files.FILE_NAME)
    code, out, err = run(capsys, tmp_path / "run")
    assert code == 0, err
    assert (tmp_path / "run" / "report.md").exists()
    assert out.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.md'}"
    for part in ("200 img/s", "1.25x", "CUDA graphs need a GPU", "skipped: resnet152: did not fit"):
        assert part in out


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    first, second = stored(tmp_path / "a" / "first.json"), stored(tmp_path / "b" / "second.json")
    assert run(capsys, first, second, "--out", tmp_path / "there")[0] == 0
    assert (tmp_path / "there" / "report.md").exists()
    assert run(capsys, first, second)[0] == 0
    assert (tmp_path / "a" / "report.md").exists() and not (tmp_path / "b" / "report.md").exists()


@pytest.mark.parametrize(("seconds", "code"), [(1.2, 1), (1.02, 0), (0.5, 0)])
def test_regressions_are_printed_and_make_code_1(seconds, code, tmp_path, capsys):
    now = stored(tmp_path / "now.json", rows=[step("fastres", seconds)], conditions=CONDITIONS | {"torch": "2.13.0"})
    earlier = stored(tmp_path / "earlier.json", rows=[step("fastres", 1.0)])
    found, out, err = run(capsys, now, "--compare", earlier)
    assert (found, err) == (code, "")
    assert ("+20.0 %" in out) == (code == 1)
    assert (f"nothing of fastres is slower than in {earlier}" in out) == (code == 0)
    assert "warning: different torch (2.11.0 earlier, 2.13.0 now)" in out
    assert "## Against an earlier run" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["cannot be read"]),
        ("{", ["is not a result file"]),
        ("[]", ["is not a result file"]),
        ('{"format": 99}', ["has format 99"]),
        ('{"format": 1, "conditions": {}, "roofline": null, "rows": [{}], "skipped": []}', ["is not a result file"]),
    ],
)
@pytest.mark.parametrize("argument", ["RESULTS", "--compare"])
def test_a_broken_file_is_one_line_and_code_2(argument, content, parts, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    if content is not None:
        broken.write_text(content)
    good = stored(tmp_path / "good.json")
    code, out, err = run(capsys, *([broken] if argument == "RESULTS" else [good, "--compare", broken]))
    assert code == 2 and not out
    assert err.count("\n") == 1 and str(broken) in err
    for part in (f"argument {argument}", *parts):
        assert part in err
    assert not (tmp_path / "report.md").exists()


def test_two_devices_are_one_line_and_code_2(tmp_path, capsys):
    first = stored(tmp_path / "first.json")
    second = stored(tmp_path / "second.json", conditions={"device": "a slide rule"})
    code, out, err = run(capsys, first, second)
    assert code == 2 and not out and err.count("\n") == 1
    assert str(first) in err and str(second) in err


def test_a_place_that_cannot_be_written_is_one_line_and_code_2(tmp_path, capsys):
    path = stored(tmp_path / "results.json")
    code, out, err = run(capsys, path, "--out", path)
    assert code == 2 and not out and err.count("\n") == 1
    assert "argument --out" in err and str(path) in err


def test_reading_and_merging_need_no_matplotlib_nor_torch(tmp_path):
    path = stored(tmp_path / "results.json")
    script = (
        "import sys; from pathlib import Path; from fastres.measure import analysis, report; "
        f"report.summary(analysis.gather([Path({str(path)!r})])); "
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
