import gzip
import struct

import numpy
import pytest
import torch

TRAIN, TEST = 64, 24


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(numpy.uint8).tobytes()))


def write_dataset(folder, train=TRAIN, test=TEST):
    """Four IDX files: noise with a bright stripe whose place tells the class."""
    random = numpy.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = numpy.arange(count) % 10
        images = random.integers(0, 100, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory):
    """Fashion-MNIST's four files, generated: 64 training and 24 test images."""
    return write_dataset(tmp_path_factory.mktemp("generated"))


@pytest.fixture
def own_dataset_folder(tmp_path):
    """The same, for a test that changes it."""
    folder = tmp_path / "own"
    folder.mkdir()
    return write_dataset(folder)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors; also keeps sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
