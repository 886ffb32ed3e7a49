"""The data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from revdata.archives import default_root
from revdata.cifar import CIFAR10, CIFAR100, Cifar
from revdata.digits import read_digits
from revdata.errors import unknown_name
from revdata.image_set import ImageSet
from revdata.splits import TrainAndTest, channel_statistics, hold_out

_SPLITS = ("train", "test", "val", "fit")
_VAL_ONE_IN = 10


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before its files are read.

    Attributes:
        train_images: Number of images in the split `train`.
        test_images: Number of images in the split `test`.
        shape: Channels, height and width of an image.
        num_classes: Number of classes.
    """

    train_images: int
    test_images: int
    shape: tuple[int, int, int]
    num_classes: int


@dataclass(frozen=True)
class _Description:
    """Where a data set comes from, and how its training images are augmented."""

    source: Cifar | Callable[[], TrainAndTest]
    info: DatasetInfo
    pad: int
    flip: bool


_DATASETS = {
    "cifar10": _Description(CIFAR10, DatasetInfo(50_000, 10_000, (3, 32, 32), 10), 4, True),
    "cifar100": _Description(CIFAR100, DatasetInfo(50_000, 10_000, (3, 32, 32), 100), 4, True),
    # One pixel of eight is what four are of 32. A mirrored digit is no digit.
    "digits": _Description(read_digits, DatasetInfo(1_442, 355, (1, 8, 8), 10), 1, False),
}


def list_datasets() -> list[str]:
    """Lists the names that `load` knows.

    Example:
        >>> list_datasets()
        ['cifar10', 'cifar100', 'digits']
    """
    return sorted(_DATASETS)


def describe(name: str) -> DatasetInfo:
    """Tells how many images a data set has and of what shape, without its files.

    Args:
        name: One of `list_datasets`.

    Raises:
        ArgumentError: The name is not known.

    Example:
        >>> describe("cifar10").shape
        (3, 32, 32)
    """
    return _description(name).info


def _description(name: str) -> _Description:
    if name not in _DATASETS:
        raise unknown_name("data set", name, list_datasets())
    return _DATASETS[name]


def load(
    name: str,
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    verify: bool = True,
    download: bool = False,
    mirror: str | None = None,
) -> ImageSet:
    """Loads one split of a data set into memory.

    Whatever the split, mean and standard deviation are those of the whole split `train`, so that a
    network trained on `fit` sees `val` and `test` as it saw its training images.

    Args:
        name: `cifar10`, `cifar100`, or `digits` (which needs scikit-learn).
        split: `train` is all training images and `test` all test images. `val` is a tenth of the
            training images of each class (5,000 of CIFAR), for choosing recipes, and `fit` the
            other nine; which images these are never changes.
        root: Folder that holds CIFAR as torchvision lays it out (`cifar-10-batches-py` or
            `cifar-100-python`) or as the official archive (`cifar-10-python.tar.gz` or
            `cifar-100-python.tar.gz`), or the path of an archive. The default is the environment
            variable `REVDATA_DIR`, or `revdata` in the user's cache folder. Digits need none.
        verify: Whether to refuse files whose checksums are not the official ones. False admits
            files that were repackaged; they are still read by an unpickler that runs nothing.
        download: Whether to fetch the official archive into `root` if it holds neither. A download
            that was interrupted goes on where it stopped, and several processes share one.
        mirror: URL or path of a folder to download from instead of the publisher's; the checksum
            of the archive is the same. The default is the environment variable `REVDATA_MIRROR`,
            if it is set.

    Returns:
        The images and labels, on the CPU.

    Raises:
        ArgumentError: The name or the split is not known.
        MissingDataError: The files are not there, or could not be downloaded.
        DamagedDataError: A file was cut short or changed, or is no CIFAR file.

    Example:
        >>> load("digits", "test")
        ImageSet('digits', 'test', 355 images of 1x8x8, 10 classes)
    """
    description = _description(name)
    if split not in _SPLITS:
        raise unknown_name("split", split, _SPLITS)
    if isinstance(description.source, Cifar):
        folder = default_root() if root is None else Path(root)
        data = description.source.read(folder, verify=verify, download=download, mirror=mirror)
    else:
        data = description.source()

    images, labels = data.train_images, data.train_labels
    mean, std = channel_statistics(images)
    if split == "test":
        images, labels = data.test_images, data.test_labels
    elif split != "train":
        val = hold_out(images, labels, _VAL_ONE_IN)
        chosen = val if split == "val" else ~val
        images, labels = images[chosen], labels[chosen]
    return ImageSet(
        name, split, images, labels, data.classes, mean, std, description.pad, description.flip
    )
