import gzip
import hashlib
import os
import shutil
import urllib.request

import numpy
import pytest

from fastres.train import fashion_mnist
from fastres.train.errors import UserError
from fastres.train.fashion_mnist import FILES

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.fixture
def lines():
    return []


@pytest.fixture
def no_apt(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def public(dataset_folder, monkeypatch):
    """The generated files, where the public download is looked for, with their checksums."""
    monkeypatch.setattr(fashion_mnist, "URL", dataset_folder.as_uri() + "/")
    set_checksums(monkeypatch, dataset_folder)


def set_checksums(monkeypatch, folder):
    for name in FILES:
        digest = hashlib.sha256(gzip.decompress((folder / name).read_bytes())).hexdigest()
        monkeypatch.setitem(fashion_mnist.FILES, name, digest)


def fake_command(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\nset -e\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def fake_apt(tmp_path, dataset_folder, monkeypatch):
    """apt-get and dpkg that deliver the generated files as the Debian package would."""
    tools = tmp_path / "tools"
    tools.mkdir()
    fake_command(tools, "apt-get", f'echo "$@" >> {tools}/calls\necho package > {fashion_mnist.PACKAGE}_1_all.deb')
    fake_command(tools, "dpkg", f'mkdir -p "$3/usr/share"\ncp {dataset_folder}/*.gz "$3/usr/share"')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(fashion_mnist, "PACKAGE_SHA256", hashlib.sha256(b"package\n").hexdigest())
    set_checksums(monkeypatch, dataset_folder)
    return tools


@pytest.mark.parametrize("place", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_files_that_are_there_are_found(place, own_dataset_folder, tmp_path, lines):
    target = tmp_path / "data" / place
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(own_dataset_folder, target, dirs_exist_ok=True)
    assert fashion_mnist.obtain(tmp_path / "data", log=lines.append).samefile(target)
    assert not lines


def test_reading_gives_images_and_labels(dataset_folder):
    images, labels = fashion_mnist.read(dataset_folder, "train")
    assert images.shape == (64, 28, 28) and images.dtype == numpy.uint8
    assert labels.tolist() == [index % 10 for index in range(64)]
    assert all(image[2 * label + 4].min() == 255 for image, label in zip(images, labels, strict=True))


def test_offline_fetches_nothing_and_says_what_was_looked_for(tmp_path, lines):
    with pytest.raises(UserError, match=r"argument --data: .*--offline") as error:
        fashion_mnist.obtain(tmp_path / "data", offline=True, log=lines.append)
    assert str(tmp_path / "data") in str(error.value)
    assert not lines and not (tmp_path / "data").exists()


def test_the_debian_package_comes_first(fake_apt, tmp_path, lines):
    found = fashion_mnist.obtain(tmp_path / "data", log=lines.append)
    assert fashion_mnist.read(found, "t10k")[0].shape == (24, 28, 28)
    assert (fake_apt / "calls").read_text().split() == ["download", fashion_mnist.PACKAGE]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["fashion-mnist"]
    assert len(lines) == 1 and "Debian" in lines[0]


def test_package_lists_are_updated_when_the_package_is_not_known(fake_apt, tmp_path, lines):
    script = (fake_apt / "apt-get").read_text().split("set -e\n")[1]
    condition = f"if [ $1 = download ] && ! grep -q update {fake_apt}/calls; then echo 'E: unknown' >&2; exit 100; fi"
    first, rest = script.split("\n", 1)
    fake_command(fake_apt, "apt-get", f"{first}\n{condition}\n{rest}")
    fashion_mnist.obtain(tmp_path / "data", log=lines.append)
    calls = (fake_apt / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["download", "update", "download"]


def test_another_package_is_refused_and_the_download_used(fake_apt, public, tmp_path, monkeypatch, lines):
    monkeypatch.setattr(fashion_mnist, "PACKAGE_SHA256", "0" * 64)
    fashion_mnist.obtain(tmp_path / "data", log=lines.append)
    assert ["Debian" in line for line in lines] == [True, False]


def test_the_download_serves_where_there_is_no_apt(no_apt, public, tmp_path, lines):
    found = fashion_mnist.obtain(tmp_path / "data", log=lines.append)
    assert sorted(path.name for path in found.iterdir()) == sorted(FILES)


def test_files_with_a_wrong_checksum_never_appear(no_apt, public, tmp_path, monkeypatch, lines):
    monkeypatch.setitem(fashion_mnist.FILES, LABELS, "0" * 64)
    with pytest.raises(UserError, match=f"{LABELS} has the wrong checksum"):
        fashion_mnist.obtain(tmp_path / "data", log=lines.append)
    assert list((tmp_path / "data").iterdir()) == []


def test_when_nothing_works_every_try_is_listed_with_its_reason(no_apt, tmp_path, monkeypatch, lines):
    def refuse(*arguments, **keywords):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as error:
        fashion_mnist.obtain(tmp_path / "data", log=lines.append)
    for part in ("argument --data", str(tmp_path / "data"), "there is no apt-get", "no route to host", "by hand"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_failing_apt_gives_its_last_line(fake_apt, public, tmp_path, monkeypatch, lines):
    fake_command(fake_apt, "apt-get", "echo first >&2; echo 'E: no network' >&2; exit 100")
    monkeypatch.setattr(fashion_mnist, "URL", (tmp_path / "nowhere").as_uri() + "/")
    with pytest.raises(UserError, match="E: no network"):
        fashion_mnist.obtain(tmp_path / "data", log=lines.append)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, lines):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="argument --data: .*cannot be written"):
        fashion_mnist.obtain(tmp_path / "file" / "data", log=lines.append)


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_not_gzip(path):
    path.write_bytes(b"not gzip")


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_wrong_type(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[2] = 13
    path.write_bytes(gzip.compress(content))


def damage_short(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def damage_empty(path):
    path.write_bytes(gzip.compress(b""))


@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_not_gzip, damage_bit, damage_wrong_type, damage_short, damage_empty]
)
def test_a_damaged_file_is_named(damage, name, own_dataset_folder):
    damage(own_dataset_folder / name)
    with pytest.raises(UserError, match=f"argument --data: .*{name}.*delete it"):
        fashion_mnist.read(own_dataset_folder, "train")


def test_images_and_labels_must_match(own_dataset_folder):
    shutil.copy(own_dataset_folder / "t10k-labels-idx1-ubyte.gz", own_dataset_folder / LABELS)
    with pytest.raises(UserError, match="64 train images but 24 labels"):
        fashion_mnist.read(own_dataset_folder, "train")
