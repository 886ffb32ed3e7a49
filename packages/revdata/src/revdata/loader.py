"""What every loader is: global batches in a fixed order, of which each rank takes its slice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from revdata.errors import ArgumentError
from revdata.image_set import ImageSet
from revdata.order import CUT_COLUMN, CUT_ROW, epoch_order, random_below, rank_bounds

_NEVER_AUGMENTED = ("test", "val")


@dataclass(eq=False)
class Loader(ABC):
    """Makes normalized batches of an `ImageSet`; iterating once is one epoch.

    The samples of a batch depend on (seed, epoch) alone, so all loaders agree on them whatever
    the device or the number of processes. All ranks make the same number of batches; where the
    last global batch is too small to go round, a rank's batch may be shorter, or empty.

    Iterating yields pairs `(x, y)`: normalized images (n, C, H, W) of `dtype`, and labels int64
    (n,), both on `device`. Padding is zero *after* normalization: it has the color of the mean.

    Attributes:
        dataset: The images.
        batch_size: Size of the *global* batch; each of `world_size` ranks makes an equal part.
        device: Where the batches are.
        augment: Whether to crop and flip at random, as far as `dataset.pad` and `dataset.flip`
            say so. Refused for the splits `test` and `val`.
        cutout: Side, in pixels, of a square that is erased in each image, around a pixel that is
            chosen at random; 0 for none. Refused for the splits `test` and `val`. From Improved
            Regularization of Convolutional Neural Networks with Cutout (DeVries and Taylor, 2017),
            https://arxiv.org/abs/1708.04552, which takes 16 for CIFAR-10 and 8 for CIFAR-100.
        shuffle: Whether each epoch has its own order.
        seed: Seed of the order and the augmentations.
        rank: Which slice of each global batch to make.
        world_size: Number of slices.
        drop_last: Whether to leave out a last batch that is smaller than `batch_size`.
        dtype: Floating dtype of the images; normalization itself is done in float32.
        memory_format: `torch.contiguous_format` or `torch.channels_last`.
        epoch: The epoch that an iteration makes, set by `set_epoch`.
        first_batch: The batch that an iteration begins with, set by `set_epoch`.

    Raises:
        ArgumentError: A batch size below one, or not divisible by `world_size`; a rank outside of
            `range(world_size)`; augmented test images; a square of negative size; no images at all,
            or no whole batch of them with `drop_last`.
    """

    dataset: ImageSet
    batch_size: int
    _: KW_ONLY
    device: torch.device | str = "cpu"
    augment: bool
    cutout: int = 0
    shuffle: bool
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    epoch: int = field(default=0, init=False)
    first_batch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        dataset, batch_size, rank, world_size = (
            self.dataset,
            self.batch_size,
            self.rank,
            self.world_size,
        )
        if batch_size < 1:
            raise ArgumentError(f"batch size (={batch_size}) must be at least 1")
        if not 0 <= rank < world_size:
            raise ArgumentError(f"rank (={rank}) must be in 0..{world_size - 1} (world_size - 1)")
        if batch_size % world_size:
            raise ArgumentError(
                f"batch size (={batch_size}) counts the images of all processes together and must "
                f"be divisible by their number (={world_size}): take a multiple of {world_size}"
            )
        if self.cutout < 0:
            raise ArgumentError(f"cutout (={self.cutout}) must not be negative")
        for name, value, off in (("augment", self.augment, False), ("cutout", self.cutout, 0)):
            if value and dataset.split in _NEVER_AUGMENTED:
                raise ArgumentError(
                    f"{dataset.split} images are never augmented: set {name} to {off}"
                )
        if not len(dataset):
            raise ArgumentError(f"{dataset!r} has no images to make batches of")
        if self.drop_last and batch_size > len(dataset):
            raise ArgumentError(
                f"batch size (={batch_size}) exceeds the {len(dataset)} images of "
                f"{dataset.name}'s {dataset.split} split: take at most {len(dataset)}"
            )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the order and the augmentations of the next iterations; the epoch is 0 at first.

        Args:
            epoch: Any integer.
            first_batch: Where in the epoch to begin. The batches before it are not made, and those
                from there on are the same: a run that was stopped amid an epoch goes on at once.

        Raises:
            ArgumentError: The epoch has no such batch (its length is allowed, and leaves nothing).
        """
        if not 0 <= first_batch <= len(self):
            raise ArgumentError(
                f"first_batch (={first_batch}) must be in 0..{len(self)} (the batches of an epoch)"
            )
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Number of batches in an epoch, the same on every rank."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this rank's slice of every global batch of the epoch, from `first_batch` on."""

    def _order(self, device: torch.device | str) -> Tensor:
        """This epoch's order of all samples, int64 (N,)."""
        return epoch_order(
            len(self.dataset),
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
            device=device,
        )

    def _squares(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Draws which rows, bool (N, H), and columns, (N, W), `cutout` erases of each sample.

        Where both are True a pixel is erased. The square may stick out of the image.
        """
        spans = []
        for size, purpose in zip(self.dataset.images.shape[2:], (CUT_ROW, CUT_COLUMN), strict=True):
            middle = random_below(size, self.seed, purpose, self.epoch, index=order)[:, None]
            place = torch.arange(size, device=order.device) - (middle - self.cutout // 2)
            spans.append((place >= 0) & (place < self.cutout))
        return spans[0], spans[1]

    def _slices(self) -> Iterator[slice]:
        """Where in the epoch's order this rank's part of each batch stands."""
        for batch in range(self.first_batch, len(self)):
            start = batch * self.batch_size
            stop = min(start + self.batch_size, len(self.dataset))
            yield slice(*rank_bounds(start, stop, self.rank, self.world_size))
