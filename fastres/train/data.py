"""Training data whose order and augmentation are a function of (seed, epoch, step) and of nothing else.

Two models trained side by side therefore see the same numbers, and so does a run that resumes. A dataset offers

- `name`, `classes` (names), `in_channels`, `train_size`, `test_size`;
- `train_batches(seed, epoch, batch, first_step)`: one epoch's batches from `first_step` on, less an incomplete last;
- `test_batches(batch)`: all test images, in order.

A batch is float32 images `[N, C, H, W]`, normalised, and int64 labels `[N]`, both on the CPU.
"""

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from . import fashion_mnist
from .errors import UserError
from .options import Options

Batch = tuple[torch.Tensor, torch.Tensor]


def load(options: Options, log=print):
    """The dataset that `options` names.

    Raises:
        UserError: the data cannot be had or read, or is smaller than one batch.
    """
    if options.dataset == "fashion-mnist":
        dataset = FashionMNIST(fashion_mnist.obtain(Path(options.data), options.offline, log), options)
    else:
        dataset = ImageFolder(Path(options.data), options)
    if dataset.train_size < options.batch:
        raise UserError(
            f"argument --batch: {options.batch} is more than the {dataset.train_size} training images; "
            f"give at most {dataset.train_size}"
        )
    return dataset


def generator(*key) -> torch.Generator:
    """A generator seeded by `key`, e.g. (seed, epoch, step); different keys give unrelated streams."""
    return torch.Generator().manual_seed(_seed(*key))


def epoch_order(seed: int, epoch: int, size: int) -> torch.Tensor:
    """The order in which an epoch visits the training images, int64 `[size]`."""
    return torch.randperm(size, generator=generator("order", seed, epoch))


def augment(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Crops each image at a random place after zero padding, and mirrors half of them.

    Args:
        images: `[N, H, W]`, any dtype.
        padding: zeros added on each side before the crop, in pixels.
    """
    n, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    padded = F.pad(images, (padding,) * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


class FashionMNIST:
    """Fashion-MNIST from its IDX files, held in memory as bytes.

    Args:
        folder: where the four files are.
        options: `augment` crops at random after 2 pixels of padding and mirrors; `train_images` and `test_images` use
            only the first so many (0: all).
    """

    name = "Fashion-MNIST"
    in_channels = 1
    classes = fashion_mnist.CLASSES

    _MEAN, _STD = 0.2860, 0.3530  # of the 60,000 training images, in units of 255
    _PADDING = 2

    def __init__(self, folder: Path, options: Options):
        self._augment = options.augment
        self._train = self._part(folder, "train", options.train_images)
        self._test = self._part(folder, "t10k", options.test_images)
        self.train_size = len(self._train[1])
        self.test_size = len(self._test[1])

    def train_batches(self, seed: int, epoch: int, batch: int, first_step: int = 0) -> Iterator[Batch]:
        images, labels = self._train
        order = epoch_order(seed, epoch, self.train_size)
        for step in range(first_step, self.train_size // batch):
            chosen = order[step * batch : (step + 1) * batch]
            crops = images[chosen]
            if self._augment:
                crops = augment(crops, self._PADDING, generator("augment", seed, epoch, step))
            yield self._normalised(crops), labels[chosen]

    def test_batches(self, batch: int) -> Iterator[Batch]:
        for images, labels in zip(*(part.split(batch) for part in self._test), strict=True):
            yield self._normalised(images), labels

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.float() / 255 - self._MEAN) / self._STD).unsqueeze(1)

    def _part(self, folder: Path, part: str, limit: int) -> Batch:
        images, labels = fashion_mnist.read(folder, part)
        if len(labels) == 0 or labels.max() >= len(self.classes):
            raise UserError(
                f"argument --data: the {part} labels in {folder} are not those of {len(self.classes)} classes; "
                "name a folder that holds Fashion-MNIST"
            )
        count = limit or len(labels)
        return torch.tensor(images[:count]), torch.tensor(labels[:count], dtype=torch.int64)


class ImageFolder:
    """`folder/train/CLASS/*` and `folder/val/CLASS/*` through torchvision, which is imported here and nowhere else.

    Training crops are RandomResizedCrop and mirroring, test crops are central. Each image's augmentation is seeded by
    (seed, epoch, step, place in the batch), so the number of workers does not matter.

    Args:
        options: `image_size` of the crops in pixels; `augment`, without which training crops are central too;
            `workers`, the processes that decode (0: this one); `train_images` and `test_images` use only the first so
            many of a fixed shuffle (0: all).
    """

    in_channels = 3

    _MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

    def __init__(self, folder: Path, options: Options):
        for part in ("train", "val"):
            if not (folder / part).is_dir():
                raise UserError(
                    f"argument --data: {folder / part} is not a folder; "
                    "lay images out as DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg"
                )
        try:
            from torchvision import datasets
            from torchvision.transforms import v2
        except Exception as error:  # torchvision beside another torch build fails with a RuntimeError
            raise UserError(
                f"argument --dataset: 'folder' needs torchvision, which does not import here ({error}); "
                "install the torchvision that fits this torch, or use --dataset fashion-mnist"
            ) from error
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self._MEAN, self._STD)]
        size = options.image_size
        central = [v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)]
        random = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()] if options.augment else central
        try:
            self._train = datasets.ImageFolder(folder / "train", v2.Compose(random + finish))
            self._test = datasets.ImageFolder(folder / "val", v2.Compose(central + finish))
        except (FileNotFoundError, OSError) as error:
            raise UserError(
                f"argument --data: {folder} cannot be read ({error}); "
                "lay images out as DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg"
            ) from error
        if self._train.classes != self._test.classes:
            raise UserError(
                f"argument --data: {folder}/train and {folder}/val hold different classes; give both the same folders"
            )
        self.name = folder.name
        self.classes = tuple(self._train.classes)
        self._workers = options.workers
        # The files are sorted by class: the first so many would be one class.
        self._train_chosen = _subset(len(self._train), options.train_images)
        self._test_chosen = _subset(len(self._test), options.test_images)
        self.train_size = len(self._train_chosen)
        self.test_size = len(self._test_chosen)

    def train_batches(self, seed: int, epoch: int, batch: int, first_step: int = 0) -> Iterator[Batch]:
        order = self._train_chosen[epoch_order(seed, epoch, self.train_size)].tolist()
        batches = [
            [(order[step * batch + place], _seed("augment", seed, epoch, step, place)) for place in range(batch)]
            for step in range(first_step, self.train_size // batch)
        ]
        return self._decoded(self._train, batches)

    def test_batches(self, batch: int) -> Iterator[Batch]:
        chosen = [(index, 0) for index in self._test_chosen.tolist()]
        return self._decoded(self._test, [chosen[start : start + batch] for start in range(0, len(chosen), batch)])

    def _decoded(self, files, batches: list) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            _Seeded(files),
            batch_sampler=batches,
            num_workers=self._workers,
            collate_fn=_collate,
            # Without its own the loader draws from the global generator, and a resumed run would draw once more.
            generator=generator("workers"),
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _Seeded(torch.utils.data.Dataset):
    """Indexed by (index, seed): the transforms draw from torch's global generator, which each image gets anew."""

    def __init__(self, files):
        self._files = files

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return self._files[index]
            except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNGs
                path = self._files.samples[index][0]
                return UserError(f"argument --data: {path} cannot be read ({error}); mend or delete it")


def _collate(items: list):
    """The batch, or the first image's error: raised in a worker it would reach the parent inside a traceback's text."""
    for item in items:
        if isinstance(item, UserError):
            return item
    return torch.utils.data.default_collate(items)


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _subset(size: int, limit: int) -> torch.Tensor:
    return torch.randperm(size, generator=generator("subset"))[:limit] if limit else torch.arange(size)


def _seed(*key) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
