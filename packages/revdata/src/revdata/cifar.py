"""CIFAR-10 and CIFAR-100.

References:
    Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from revdata.archives import Archive, read_files
from revdata.errors import DamagedDataError
from revdata.splits import TrainAndTest
from revdata.unpickle import unpickle

_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Cifar:
    """How one of the two is laid out.

    Attributes:
        archive: Its files.
        train: The files of training images, in order.
        test: The file of test images.
        meta: The file of class names.
        labels: Key of the labels in the files of images.
        names: Key of the class names in `meta`.
    """

    archive: Archive
    train: Sequence[str]
    test: str
    meta: str
    labels: str
    names: str

    def read(self, root: Path, *, verify: bool, download: bool, mirror: str | None) -> TrainAndTest:
        """Reads all images; arguments and errors are those of `revdata.load`."""
        files = read_files(self.archive, root, verify=verify, download=download, mirror=mirror)
        records = {
            name: unpickle(content, f"{self.archive.folder}/{name} of {root}")
            for name, content in files
        }
        try:
            classes = tuple(str(name) for name in records[self.meta][self.names])
            train = self._images([records[name] for name in self.train], len(classes))
            test = self._images([records[self.test]], len(classes))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DamagedDataError(
                f"{self.archive.folder} of {root} holds pickles, but not CIFAR's ({error!r}): "
                "replace it by the official files"
            ) from error
        return TrainAndTest(classes, *train, *test)

    def _images(
        self, records: Sequence[dict[str, Any]], num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images = np.concatenate([record["data"] for record in records])
        labels = np.concatenate([np.asarray(record[self.labels], np.int64) for record in records])
        images = images.reshape(len(labels), *_SHAPE)
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"labels outside of 0..{num_classes - 1}")
        return torch.from_numpy(images), torch.from_numpy(labels)


CIFAR10 = Cifar(
    archive=Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        md5={
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    train=[f"data_batch_{i}" for i in range(1, 6)],
    test="test_batch",
    meta="batches.meta",
    labels="labels",
    names="label_names",
)

CIFAR100 = Cifar(
    archive=Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        md5={
            "meta": "7973b15100ade9c7d40fb424638fde48",
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
    train=["train"],
    test="test",
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
)
