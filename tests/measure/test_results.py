"""The file that a run leaves."""

import json

import pytest

from fastres.measure import results
from fastres.measure.results import Results, ResultsError, Roofline, Row

ROOFLINE = Roofline(copy=2e12, gemm={"bfloat16": 4e14})
ROW = Row(
    *("models", "resnet50", "step", "fastres", (256, 3, 224, 224), "bfloat16", 256),
    seconds=0.1,
    bytes=10**11,
    flops=6 * 10**12,
    saved_bytes=256 * 10**7,
)
REFUSED = Row("kernels", "gram", "call", "fastres triton", (2, 3, 3, 8), "bfloat16", 2, refused="wrong results")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new" / results.FILE_NAME
    results.write(path, Results({"device": "a GPU"}, ROOFLINE, [ROW, REFUSED], ["units: no time left"]))
    return path


def test_what_is_written_is_read(path):
    assert results.read(path) == results.read(path.parent)
    assert results.read(path) == Results({"device": "a GPU"}, ROOFLINE, [ROW, REFUSED], ["units: no time left"])


def test_rates_stand_in_the_file(path):
    """0.05 s is the time of 1e11 bytes at 2 TB/s; the products take 0.015 s."""
    timed, refused = json.loads(path.read_text())["rows"]
    assert timed["images_per_second"] == pytest.approx(2560)
    assert timed["gigabytes_per_second"] == pytest.approx(1000)
    assert timed["teraflops_per_second"] == pytest.approx(60)
    assert timed["roofline_percent"] == pytest.approx(50)
    assert timed["saved_bytes_per_image"] == 1e7
    assert {refused[name] for name in results._rates(REFUSED, ROOFLINE)} == {None}


def test_no_share_where_the_roofline_that_bounds_a_row_is_unknown():
    assert ROW.roofline_share(None) is None
    assert ROW.roofline_share(Roofline(2e12, {"float32": 1e14})) is None


def test_a_file_readable_by_all_that_may_read_the_folder(path):
    assert path.stat().st_mode & 0o044 == path.parent.stat().st_mode & 0o044


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a result file of fastres"),
        ("[]", "is not a result file of fastres"),
        ('{"format": 99}', "has format 99, this version of fastres reads 1"),
        ('{"format": 1, "conditions": {}, "roofline": null, "rows": [{}], "skipped": []}', "is not a result file"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=message) as raised:
        results.read(path)
    assert str(path) in str(raised.value)
