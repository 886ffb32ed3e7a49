"""From a configuration to revdata's loaders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

import revdata
from revdata import ImageSet
from revtrain.config import TrainConfig
from revtrain.net import memory_format


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it is evaluated on.

    Attributes:
        train: Batches of the training images.
        test: Batches of the others.
        split: What these are: `test`, or `val` where the run holds validation images out.
        num_classes: Outputs of the network.
        channels: Channels of the images.
    """

    train: revdata.Loader
    test: revdata.Loader
    split: str
    num_classes: int
    channels: int


def load_data(config: TrainConfig, accelerator: Accelerator) -> Data:
    """Loads the images of a run, and makes this process's loaders.

    Raises:
        revdata.DataError: They are missing or damaged.
        ValueError: There are more classes than outputs, or the batch size cannot be.
    """
    train_split, split = ("fit", "val") if config.val else ("train", "test")
    # All processes at once: a lock makes one of them download. In a barrier the others would
    # wait for longer than a process group allows.
    train_images, images = (
        load_images(
            config.data,
            name,
            data_dir=config.data_dir,
            verify=config.verify,
            download=config.download,
            mirror=config.mirror,
        )
        for name in (train_split, split)
    )
    num_classes = config.num_classes or len(train_images.classes)
    refuse_more_classes(train_images, num_classes)
    recipe = config.resolved_recipe
    train = make_loader(
        train_images,
        recipe.batch_size,
        accelerator,
        kind=config.loader,
        train=True,
        augment=recipe.augment,
        cutout=recipe.cutout,
        seed=config.seed,
    )
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    batch = evaluation_batch(recipe.batch_size, parts, accelerator)
    test = make_loader(images, batch, accelerator, kind=config.loader)
    return Data(train, test, split, num_classes, train_images.images.shape[1])


def load_images(
    name: str,
    split: str,
    *,
    data_dir: Path | None,
    verify: bool,
    download: bool | None = None,
    mirror: str | None = None,
) -> ImageSet:
    """Loads a split; `revdata.DataError` says what is wrong.

    Where no folder was named, nobody can have put files there, and they are downloaded, as where a
    mirror was named. Several processes may call this at once: one of them downloads.
    """
    if download is None:
        named = data_dir is not None or bool(os.environ.get("REVDATA_DIR"))
        download = mirror is not None or not named
    return revdata.load(name, split, root=data_dir, verify=verify, download=download, mirror=mirror)


def refuse_more_classes(images: ImageSet, num_classes: int) -> None:
    """Raises if a label would have no output.

    Raises:
        ValueError: There are more classes than outputs.
    """
    if len(images.classes) > num_classes:
        raise ValueError(
            f"num_classes (={num_classes}) is less than the {len(images.classes)} classes of "
            f"{images.name}: the network needs an output for each of them"
        )


def evaluation_batch(batch_size: int, parts: int, accelerator: Accelerator) -> int:
    """Returns a batch of which a process gets as many images as it held in training.

    So evaluation needs no more memory than training did.

    Args:
        batch_size: Of training.
        parts: In how many parts it was held: processes times `accumulate`.
        accelerator: Evaluates.
    """
    processes: int = accelerator.num_processes
    return max(batch_size // parts, 1) * processes


def make_loader(
    images: ImageSet,
    batch_size: int,
    accelerator: Accelerator,
    *,
    kind: str = "device",
    train: bool = False,
    augment: bool = False,
    cutout: int = 0,
    seed: int = 0,
) -> revdata.Loader:
    """Makes this process's loader: shuffled whole batches to train on, or all images in order."""
    # Not passed to accelerator.prepare, which would slice the slices once more: revdata gives each
    # rank its part of every global batch already, in an order that does not depend on how many
    # there are. Accelerate's own sharding deals out whole batches instead, and resuming in
    # mid-epoch then sees other samples.
    maker = revdata.TorchLoader if kind == "torch" else revdata.DeviceLoader
    return maker(
        images,
        batch_size,
        device=accelerator.device,
        augment=augment,
        cutout=cutout,
        shuffle=train,
        drop_last=train,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        memory_format=memory_format(accelerator.device),
    )
