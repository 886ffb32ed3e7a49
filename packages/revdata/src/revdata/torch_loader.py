"""The same batches by the standard means: torch's DataLoader and torchvision's transforms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from revdata.errors import ArgumentError
from revdata.image_set import ImageSet
from revdata.loader import Loader
from revdata.order import TRANSFORM, hash_integers

# A sample's index and the seed of its transforms. The seed travels with the index, so that worker
# processes need not be told of the epoch.
_Key = tuple[int, int]
_Batch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class TorchLoader(Loader):
    """Makes batches on the CPU, in `num_workers` processes, and copies them to the device.

    The reference that `DeviceLoader` is tested against, and the place to start from for transforms
    of one's own. The order is that of `DeviceLoader`; crops and flips are other draws from the same
    distribution, seeded for each sample by (seed, epoch, sample). The global random state is left
    as it was. Arguments, batches and errors are those of `Loader`, and:

    Attributes:
        num_workers: Processes that make batches; 0 makes them in this one.

    Raises:
        ArgumentError: Also for a negative number of workers.

    Example:
        >>> import revdata
        >>> digits = revdata.load("digits", "test")
        >>> loader = TorchLoader(digits, 100, augment=False, shuffle=False)
        >>> x, y = next(iter(loader))
        >>> x.shape, y.shape
        (torch.Size([100, 1, 8, 8]), torch.Size([100]))
    """

    _: KW_ONLY
    num_workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < 0:
            raise ArgumentError(f"num_workers (={self.num_workers}) must not be negative")
        self._keys = _Keys()
        self._batches: DataLoader[_Batch] = DataLoader(
            _Samples(self.dataset, self.augment),
            batch_sampler=self._keys,
            collate_fn=_as_made,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.device(self.device).type == "cuda",
            # Without one of its own, each iteration would draw from the global generator.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[_Batch]:
        order = self._order("cpu")
        seeds = hash_integers(self.seed, TRANSFORM, self.epoch, index=order)
        keys = list(zip(order.tolist(), seeds.tolist(), strict=True))
        parts = list(self._slices())
        self._keys.batches = [keys[part] for part in parts]
        squares = self._squares(order) if self.cutout else None
        for part, (images, labels) in zip(parts, self._batches, strict=True):
            if squares is not None:
                rows, columns = (square[part] for square in squares)
                images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
            x = images.to(self.device, non_blocking=True).to(self.dtype)
            y = labels.to(self.device, non_blocking=True)
            yield x.contiguous(memory_format=self.memory_format), y


class _Keys:
    """Lists the keys of each batch of an epoch.

    It knows nothing of its loader: a cycle between them would leave worker processes to the
    garbage collector, which might run in another worker.
    """

    def __init__(self) -> None:
        self.batches: list[list[_Key]] = []

    def __iter__(self) -> Iterator[list[_Key]]:
        return iter(self.batches)


class _Samples(Dataset[_Batch]):
    """Makes a batch of the samples with the given keys."""

    def __init__(self, dataset: ImageSet, augment: bool) -> None:
        # Here, because torchvision takes a second to import, and the other loader needs none of it.
        from torchvision.transforms import v2  # noqa: PLC0415

        self._images, self._labels = dataset.images, dataset.labels
        # Normalized before it is padded: the padding is zero, the mean color.
        self._normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
        )
        size = dataset.images.shape[2:]
        steps = [v2.RandomCrop(size, padding=dataset.pad)] if dataset.pad else []
        steps += [v2.RandomHorizontalFlip()] if dataset.flip else []
        self._augment = v2.Compose(steps) if augment and steps else None

    def __getitems__(self, keys: list[_Key]) -> _Batch:
        index = torch.tensor([index for index, _ in keys], dtype=torch.int64)
        x: Tensor = self._normalize(self._images[index])
        if self._augment is not None:
            with torch.random.fork_rng(devices=[]):
                for i, (_, seed) in enumerate(keys):
                    torch.default_generator.manual_seed(seed)
                    x[i] = self._augment(x[i])
        return x, self._labels[index]


def _as_made(batch: Any) -> Any:
    """The samples come as a batch already; there is nothing left to collate."""
    return batch
