"""From a configuration to revdata's loaders."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator

import revdata
from revdata import ImageSet
from revtrain.net import memory_format


def load_images(
    name: str, split: str, *, data_dir: Path | None, verify: bool, download: bool = False
) -> ImageSet:
    """Loads a split; `revdata.DataError` says what is wrong.

    Where no folder was named, nobody can have put files there, and they are downloaded.
    """
    named = data_dir is not None or bool(os.environ.get("REVDATA_DIR"))
    return revdata.load(name, split, root=data_dir, verify=verify, download=download or not named)


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


def make_loader(
    images: ImageSet,
    batch_size: int,
    accelerator: Accelerator,
    *,
    kind: str = "device",
    train: bool = False,
    augment: bool = False,
    seed: int = 0,
) -> revdata.Loader:
    """Makes this process's loader: shuffled whole batches to train on, or all images in order."""
    # Not passed to accelerator.prepare, which would slice the slices once more: revdata gives each
    # rank its part of every global batch already, in an order that does not depend on how many
    # there are. Accelerate's own sharding deals out whole batches instead, and resuming in
    # mid-epoch then sees other samples.
    if not train:  # a recipe's batch size must suit the processes; this one is ours to choose
        batch_size += -batch_size % accelerator.num_processes
    maker = revdata.TorchLoader if kind == "torch" else revdata.DeviceLoader
    return maker(
        images,
        batch_size,
        device=accelerator.device,
        augment=augment,
        shuffle=train,
        drop_last=train,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        memory_format=memory_format(accelerator.device),
    )
