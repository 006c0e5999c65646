import gzip

import numpy
import pytest
import torch

from fastres.train import data
from fastres.train.errors import UserError
from fastres.train.options import Options


@pytest.fixture
def fashion(dataset_folder):
    return data.FashionMNIST(dataset_folder, Options())


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_an_epoch_visits_every_image_once():
    assert sorted(data.epoch_order(3, 1, 50).tolist()) == list(range(50))


def test_batches_depend_on_seed_and_epoch_alone(fashion):
    first = list(fashion.train_batches(0, 0, 8))
    torch.rand(5)
    assert same(first, fashion.train_batches(0, 0, 8))
    assert not same(first, fashion.train_batches(0, 1, 8))
    assert not same(first, fashion.train_batches(1, 0, 8))


@pytest.mark.parametrize("first_step", [0, 3, 7, 8])
def test_an_epoch_can_begin_in_its_middle(fashion, first_step):
    assert same(list(fashion.train_batches(0, 2, 8))[first_step:], fashion.train_batches(0, 2, 8, first_step))


def test_the_global_generator_is_left_alone(fashion):
    before = torch.get_rng_state()
    list(fashion.train_batches(0, 0, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_the_last_incomplete_training_batch_is_dropped_but_no_test_image_is(fashion):
    assert [len(labels) for _, labels in fashion.train_batches(0, 0, 24)] == [24, 24]
    assert [len(labels) for _, labels in fashion.test_batches(10)] == [10, 10, 4]


def test_test_images_are_normalised_and_in_order(fashion, dataset_folder):
    raw, labels = data.fashion_mnist.read(dataset_folder, "t10k")
    images = torch.cat([images for images, _ in fashion.test_batches(7)])
    assert images.shape == (24, 1, 28, 28) and images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0].numpy(), ((raw / 255 - 0.2860) / 0.3530).astype(numpy.float32))
    assert torch.cat([labels for _, labels in fashion.test_batches(7)]).tolist() == labels.tolist()


def test_without_augmentation_the_images_are_the_files(dataset_folder):
    plain = data.FashionMNIST(dataset_folder, Options(augment=False, train_images=16, test_images=5))
    assert (plain.train_size, plain.test_size) == (16, 5)
    raw, _ = data.fashion_mnist.read(dataset_folder, "train")
    (images, labels), *_ = plain.train_batches(0, 0, 16)
    order = data.epoch_order(0, 0, 16)
    torch.testing.assert_close(images[:, 0].numpy(), ((raw[order] / 255 - 0.2860) / 0.3530).astype(numpy.float32))
    assert labels.tolist() == [index % 10 for index in order.tolist()]


def test_augmented_images_are_shifted_and_mirrored_windows():
    images = torch.randint(1, 256, (200, 5, 7), dtype=torch.uint8)
    padding = 2
    results = data.augment(images, padding, data.generator("test"))
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    seen = set()
    for image, result in zip(padded, results, strict=True):
        windows = {(top, left): image[top : top + 5, left : left + 7] for top in range(5) for left in range(5)}
        matches = [(*place, False) for place, window in windows.items() if torch.equal(window, result)]
        matches += [(*place, True) for place, window in windows.items() if torch.equal(window.flip(-1), result)]
        assert len(matches) == 1
        seen.add(matches[0])
    tops, lefts, mirrored = map(set, zip(*seen, strict=True))
    assert tops == lefts == set(range(5)) and mirrored == {False, True}


def test_labels_of_another_dataset_are_refused(own_dataset_folder):
    path = own_dataset_folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + bytes([10])))
    with pytest.raises(UserError, match="argument --data: the train labels"):
        data.FashionMNIST(own_dataset_folder, Options())


def test_a_batch_larger_than_the_data_is_refused(dataset_folder):
    with pytest.raises(UserError, match="argument --batch: 65 .*at most 64"):
        data.load(Options(data=str(dataset_folder), batch=65))
