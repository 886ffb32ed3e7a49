import hashlib
import sys

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import revdata
from revdata import ArgumentError, ImageSet, MissingDataError
from revdata.splits import hold_out

# SHA-256 of the images of val, sorted: whoever changes which these are makes every result that
# was chosen on val incomparable.
VAL_OF_DIGITS = "22cf986177925035672f16db38aea8869e0157adda32e516713ebcdc6db3b717"
VAL_OF_CIFAR = {
    "cifar10": "b0a8354ff721fa0d79e62f12a5efba3103e794a56100771850e6a5aa2d94b4e7",
    "cifar100": "f445961e279d7716f3ce574cfbc7cd44614c4a251eef287bb60779004c4ec02e",
}


def digests(images):
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


def fingerprint(images):
    return hashlib.sha256("".join(sorted(digests(images))).encode()).hexdigest()


@pytest.fixture(scope="module")
def splits(cifar):
    name, root = cifar
    # CIFAR-100 may be a repackaged one, and small files are never official.
    return {
        split: revdata.load(name, split, root=root, verify=False)
        for split in ("train", "test", "val", "fit")
    }


def test_images_and_labels(splits):
    for split, dataset in splits.items():
        assert dataset.split == split
        assert dataset.images.dtype == torch.uint8
        assert dataset.images.shape[1:] == (3, 32, 32)
        assert dataset.labels.dtype == torch.int64
        assert len(dataset.labels) == len(dataset)
        assert len(dataset.classes) == int(dataset.labels.max()) + 1
        assert (dataset.pad, dataset.flip) == (4, True)


def test_val_is_a_balanced_tenth_and_fit_the_rest(splits):
    train, val, fit = (splits[split] for split in ("train", "val", "fit"))
    per_class = len(train) // len(train.classes)
    assert set(val.labels.bincount().tolist()) == {per_class // 10}
    assert set(fit.labels.bincount().tolist()) == {per_class - per_class // 10}
    both = list(zip(digests(val.images), val.labels.tolist(), strict=True))
    both += zip(digests(fit.images), fit.labels.tolist(), strict=True)
    assert sorted(both) == sorted(zip(digests(train.images), train.labels.tolist(), strict=True))


def test_statistics_are_those_of_the_training_images(splits):
    for channel in range(3):
        pixels = splits["train"].images[:, channel].numpy() / np.float32(255)
        mean, std = pixels.mean(dtype=float), pixels.std(dtype=float)
        for dataset in splits.values():
            assert dataset.mean[channel] == pytest.approx(mean, abs=1e-6)
            assert dataset.std[channel] == pytest.approx(std, abs=1e-6)


def test_real_cifar_is_what_torchvision_reads(cifar, splits):
    name, root = cifar
    if len(splits["train"]) < 50_000:
        pytest.skip("REVDATA_DIR names no real data")
    if name == "cifar10":
        theirs = CIFAR10(root, train=False)
        ours = revdata.load(name, "test", root=root)
        assert torch.equal(ours.images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
        assert ours.labels.tolist() == theirs.targets
        assert list(ours.classes) == theirs.classes
    assert fingerprint(splits["val"].images) == VAL_OF_CIFAR[name]


def test_digits():
    train, test, val, fit = (
        revdata.load("digits", split) for split in ("train", "test", "val", "fit")
    )
    assert len(train) + len(test) == 1797
    assert len(val) + len(fit) == len(train)
    assert train.images.shape[1:] == (1, 8, 8)
    assert int(train.images.max()) == 255
    assert (train.pad, train.flip) == (1, False)
    assert not set(digests(train.images)) & set(digests(test.images))
    assert set(val.labels.bincount().tolist()) == {14}
    assert min(test.labels.bincount()) >= 34
    assert fingerprint(val.images) == VAL_OF_DIGITS


def check_description(train, test):
    info = revdata.describe(train.name)
    assert (len(train), len(test)) == (info.train_images, info.test_images)
    assert tuple(train.images.shape[1:]) == info.shape
    assert len(train.classes) == info.num_classes


def test_a_description_is_that_of_the_files(splits):
    check_description(revdata.load("digits", "train"), revdata.load("digits", "test"))
    if len(splits["train"]) >= 50_000:  # the real one
        check_description(splits["train"], splits["test"])


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDataError, match="pip install scikit-learn"):
        revdata.load("digits", "train")


def test_what_is_held_out_does_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, 1, 4, 4), generator=generator).byte()
    labels = torch.arange(200) % 7
    shuffled = torch.randperm(200, generator=generator)
    held = hold_out(images, labels, 5)
    assert torch.equal(hold_out(images[shuffled], labels[shuffled], 5), held[shuffled])
    assert labels[held].bincount().tolist() == [n // 5 for n in labels.bincount().tolist()]


def test_unknown_names_are_refused_with_the_right_ones():
    with pytest.raises(
        ArgumentError, match=r"'cifar-10'; known: .*digits; did you mean 'cifar10'\?"
    ):
        revdata.load("cifar-10", "train")
    with pytest.raises(ArgumentError, match=r"did you mean 'cifar100'\?"):
        revdata.describe("CIFAR100")
    with pytest.raises(ArgumentError, match=r"split 'validation'; known: train, test, val, fit"):
        revdata.load("digits", "validation")
    assert revdata.list_datasets() == ["cifar10", "cifar100", "digits"]


BLANK = {
    "name": "blank",
    "split": "train",
    "images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
    "labels": torch.tensor([0, 1]),
    "classes": ("a", "b"),
    "mean": (0.5,),
    "std": (1.0,),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 1, 4, 4)}, "uint8"),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "N, C, H, W"),
        ({"labels": torch.tensor([0])}, r"\(2,\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, "int64"),
        ({"labels": torch.tensor([0, 2])}, "2 classes"),
        ({"labels": torch.tensor([-1, 0])}, "from -1"),
        ({"mean": (0.5, 0.5)}, "1 channels"),
        ({"std": (0.0,)}, "positive"),
        ({"pad": -1}, "negative"),
    ],
)
def test_an_image_set_checks_its_parts(change, message):
    assert len(ImageSet(**BLANK)) == 2
    with pytest.raises(ArgumentError, match=message):
        ImageSet(**{**BLANK, **change})
