import os
import pickle

import pytest
import torch

from fastres.train import checkpoint
from fastres.train.errors import UserError

CONTENTS = {"options": {"lr": 0.1}, "epoch": 1, "step": 2, "trainers": {"fused": torch.arange(5.0)}, "rng": {}}


def test_what_was_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "c.pt", CONTENTS)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(loaded["trainers"].pop("fused"), torch.arange(5.0))
    assert loaded == {**CONTENTS, "trainers": {}, "format": checkpoint.FORMAT}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c.pt", CONTENTS)

    def fail_midway(contents, file):
        file.write(b"half")
        raise RuntimeError("disk trouble")

    monkeypatch.setattr(torch, "save", fail_midway)
    with pytest.raises(RuntimeError, match="disk trouble"):
        checkpoint.save(tmp_path / "c.pt", {**CONTENTS, "epoch": 9})
    assert checkpoint.load(tmp_path / "c.pt")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_the_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []

    def record(name):
        call = getattr(os, name)

        def recorded(*arguments):
            calls.append(name)
            return call(*arguments)

        monkeypatch.setattr(os, name, recorded)

    record("fsync")
    record("replace")
    checkpoint.save(tmp_path / "c.pt", CONTENTS)
    assert calls == ["fsync", "replace", "fsync"]


def test_the_file_gets_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "c.pt", CONTENTS)
    finally:
        os.umask(before)
    assert (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o640


def damaged_empty(path):
    path.write_bytes(b"")


def damaged_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_text(path):
    path.write_text("no checkpoint")


def damaged_middle(path):
    content = bytearray(path.read_bytes())
    start = content.index(b"options")
    content[start - 20 : start + 20] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damaged_empty, damaged_half, damaged_text, damaged_middle])
def test_a_damaged_checkpoint_is_named_in_one_line(damage, tmp_path):
    checkpoint.save(tmp_path / "c.pt", CONTENTS)
    damage(tmp_path / "c.pt")
    with pytest.raises(UserError, match="argument --resume: .*c.pt is damaged or no checkpoint") as error:
        checkpoint.load(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents, 2))])
def test_code_in_a_checkpoint_is_not_run(save, tmp_path):
    save({**CONTENTS, "format": checkpoint.FORMAT, "trainers": _Malicious(tmp_path / "trace")}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="argument --resume"):
        checkpoint.load(tmp_path / "c.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("missing", [key for key in checkpoint.KEYS if key != "format"])
def test_missing_parts_are_named(missing, tmp_path):
    torch.save({"format": 1, **{key: value for key, value in CONTENTS.items() if key != missing}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=f"lacks {missing}"):
        checkpoint.load(tmp_path / "c.pt")


def test_another_programs_file_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(UserError, match="no checkpoint of fastres train"):
        checkpoint.load(tmp_path / "c.pt")


def test_another_format_is_refused(tmp_path):
    torch.save({**CONTENTS, "format": 99}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_file_that_is_not_there_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="argument --resume: there is no .*missing.pt"):
        checkpoint.load(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="argument --resume: .*is a folder"):
        checkpoint.load(tmp_path)


def test_a_full_disk_is_reported(tmp_path):
    with pytest.raises(UserError, match="argument --out: .*cannot be written"):
        checkpoint.save(tmp_path / "gone" / "c.pt", CONTENTS)
