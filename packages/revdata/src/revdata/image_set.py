"""A labelled set of images in memory, with all that a loader must know of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revdata.errors import ArgumentError


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images and labels of one split, with the statistics and augmentations of their data set.

    Any uint8 images can be put in one, so the loaders work for data that this package has no
    name for.

    Attributes:
        name: Name of the data set.
        split: Name of the split; sets named `"test"` and `"val"` are never augmented.
        images: uint8 tensor (N, C, H, W).
        labels: int64 tensor (N,), each in `range(len(classes))`.
        classes: Name of each class.
        mean: Mean of each channel over the training images, with pixels in 0..1.
        std: Standard deviation of each channel over the training images, with pixels in 0..1.
        pad: Pixels of padding on each side from which a random crop is taken in training.
        flip: Whether half of the training images are mirrored left to right.

    Raises:
        ArgumentError: Shapes or dtypes differ from the above, or a label names no class.

    Example:
        >>> blank = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> ImageSet("blank", "train", blank, torch.tensor([0, 1]), ("a", "b"), (0.0,), (1.0,))
        ImageSet('blank', 'train', 2 images of 1x8x8, 2 classes)
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ArgumentError(
                f"images must be uint8 (N, C, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ArgumentError(
                f"labels must be int64 ({len(images)},), not {labels.dtype} {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ArgumentError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but there are "
                f"{len(self.classes)} classes"
            )
        channels = images.shape[1]
        if not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise ArgumentError(
                f"mean (={self.mean}) and std (={self.std}) need one value for each of "
                f"{channels} channels, and std must be positive"
            )
        if self.pad < 0:
            raise ArgumentError(f"pad (={self.pad}) must not be negative")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.images.shape[1:])
        return (
            f"ImageSet({self.name!r}, {self.split!r}, {len(self)} images of {shape}, "
            f"{len(self.classes)} classes)"
        )
