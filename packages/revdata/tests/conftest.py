"""Small CIFAR files of the official format, and the real ones where REVDATA_DIR names them."""

import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from revdata import datasets

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's strings, as CIFAR's authors did."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[str] = save_string
    dispatch[bytes] = save_string


def python2_pickle(record):
    """Pickles as Python 2 and the numpy of its time did."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(record)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def small_cifar10():
    """5 x 40 training images, 20 test images, by file name."""
    files = {
        "batches.meta": {"num_cases_per_batch": 40, "label_names": [f"class{i}" for i in range(10)]}
    }
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        count = 40 if "data" in name else 20
        labels = np.random.default_rng(i).permutation(np.arange(count) % 10).tolist()
        names = [f"image{k}.png" for k in range(count)]
        data = pixels(count, seed=i)
        files[name] = {"batch_label": name, "labels": labels, "data": data, "filenames": names}
    return {name: python2_pickle(record) for name, record in files.items()}


def small_cifar100():
    """2,000 training images, 200 test images, as Python 3 writes them."""
    files = {"meta": {"fine_label_names": [f"class{i}" for i in range(100)]}}
    for name, count in (("train", 2000), ("test", 200)):
        labels = np.random.default_rng(count).permutation(np.arange(count) % 100).tolist()
        files[name] = {"fine_labels": labels, "data": pixels(count, seed=count)}
    return {name: pickle.dumps(record, protocol=2) for name, record in files.items()}


def pack(files, folder):
    """Makes a .tar.gz of the files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in {"readme.html": b"", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@dataclass(frozen=True)
class Small:
    """A small data set: what its official files would be."""

    name: str
    folder: str
    files: dict[str, bytes]
    packed: bytes

    @property
    def archive(self):
        return {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[
            self.name
        ]

    def unpack_into(self, root: Path) -> Path:
        folder = root / self.folder
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


def make_small(name):
    files = small_cifar10() if name == "cifar10" else small_cifar100()
    return Small(name, FOLDERS[name], files, pack(files, FOLDERS[name]))


@pytest.fixture(scope="session", params=["cifar10", "cifar100"])
def small(request):
    return make_small(request.param)


@pytest.fixture
def official(small, monkeypatch):
    """Declares the small files to be the official ones."""
    description = datasets._DATASETS[small.name]
    archive = dataclasses.replace(
        description.source.archive,
        sha256=hashlib.sha256(small.packed).hexdigest(),
        md5={name: hashlib.md5(content).hexdigest() for name, content in small.files.items()},
    )
    source = dataclasses.replace(description.source, archive=archive)
    description = dataclasses.replace(description, source=source)
    monkeypatch.setitem(datasets._DATASETS, small.name, description)
    return small


@pytest.fixture(scope="session", params=["cifar10", "cifar100"])
def cifar(request, tmp_path_factory):
    """Name and root of a data set: the real one if there is one, or else a small one."""
    real = os.environ.get("REVDATA_DIR")
    if real and (Path(real) / FOLDERS[request.param]).is_dir():
        return request.param, Path(real)
    root = tmp_path_factory.mktemp("data")
    make_small(request.param).unpack_into(root)
    return request.param, root


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
