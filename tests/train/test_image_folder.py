import sys

import numpy
import pytest
import torch

from fastres.train import data
from fastres.train.errors import UserError
from fastres.train.options import Options

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}

_library = None


@pytest.fixture(scope="module")
def torchvision():
    """torchvision's operators are missing beside a CPU torch: their schemas are enough to import it."""
    global _library
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))


@pytest.fixture
def folder(tmp_path, torchvision):
    """Images of 40x30 pixels, 6 to train and 2 to test in each of two classes; noise over the class's colour."""
    from PIL import Image

    random = numpy.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name, colour in COLOURS.items():
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = numpy.clip(random.integers(0, 60, (30, 40, 3)) + numpy.array(colour), 0, 255)
                Image.fromarray(pixels.astype(numpy.uint8)).save(place / f"{index}.png")
    return tmp_path


def load(folder, **options):
    return data.ImageFolder(folder, Options(**{"image_size": 16, "workers": 0, **options}))


def test_batches_hold_normalised_crops_and_labels(folder):
    images = load(folder)
    assert (images.classes, images.train_size, images.test_size) == (("blue", "red"), 12, 4)
    batches = list(images.train_batches(0, 0, 4))
    assert len(batches) == 3
    assert all(batch.shape == (4, 3, 16, 16) and batch.dtype == torch.float32 for batch, _ in batches)
    for batch, labels in batches:
        assert torch.equal(batch[:, 0].mean((1, 2)) > batch[:, 2].mean((1, 2)), labels == 1)
    assert [labels.tolist() for _, labels in images.test_batches(3)] == [[0, 0, 1], [1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_neither_on_the_workers_nor_on_where_an_epoch_begins(folder, workers):
    expected = list(load(folder).train_batches(5, 1, 4))
    before = torch.get_rng_state()
    for first_step in (0, 2):
        found = list(load(folder, workers=workers).train_batches(5, 1, 4, first_step))
        assert len(found) == 3 - first_step
        for one, other in zip(expected[first_step:], found, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_are_augmented_differently_and_not_at_all_on_request(folder):
    def sums(epoch, **options):
        return sorted(
            float(image.sum()) for images, _ in load(folder, **options).train_batches(0, epoch, 4) for image in images
        )

    assert sums(0) != sums(1)
    assert sums(0, augment=False) == sums(1, augment=False)


def test_a_subset_is_not_one_class(folder):
    images = load(folder, train_images=8)
    assert images.train_size == 8
    assert set(torch.cat([labels for _, labels in images.train_batches(0, 0, 8)]).tolist()) == {0, 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(folder, workers):
    path = folder / "train" / "red" / "3.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="argument --data: .*red/3.png cannot be read") as error:
        list(load(folder, workers=workers).train_batches(0, 0, 4))
    assert "\n" not in str(error.value)


def test_a_folder_without_the_layout_is_refused(tmp_path):
    with pytest.raises(UserError, match="argument --data: .*train is not a folder"):
        load(tmp_path)


def test_a_class_without_images_is_refused(folder):
    for path in (folder / "val" / "red").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="argument --data: .*cannot be read"):
        load(folder)


def test_different_classes_are_refused(folder):
    (folder / "val" / "red").rename(folder / "val" / "green")
    with pytest.raises(UserError, match="argument --data: .*different classes"):
        load(folder)


def test_torchvision_that_does_not_import_is_reported(tmp_path, monkeypatch):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="argument --dataset: 'folder' needs torchvision"):
        load(tmp_path)
