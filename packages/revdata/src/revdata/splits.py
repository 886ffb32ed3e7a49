"""Which images are held out, and what the training images say of pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TrainAndTest:
    """All images of a data set.

    Attributes:
        classes: Name of each class.
        train_images: uint8 (N, C, H, W).
        train_labels: int64 (N,).
        test_images: uint8 (M, C, H, W).
        test_labels: int64 (M,).
    """

    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def hold_out(images: Tensor, labels: Tensor, one_in: int) -> Tensor:
    """Chooses one in `one_in` images of each class, for ever the same.

    They are the first by the SHA-256 of their pixels: a choice as good as random that depends on
    no seed, no library's generator, and not on where in its file an image stands.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        one_in: Of n images of a class, n // one_in are chosen.

    Returns:
        bool tensor (N,), true for the chosen.
    """
    rows = images.flatten(1).numpy()
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    by_digest = torch.tensor(sorted(range(len(rows)), key=digests.__getitem__), dtype=torch.int64)
    held = torch.zeros(len(rows), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = by_digest[labels[by_digest] == label]
        held[members[: len(members) // one_in]] = True
    return held


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes mean and standard deviation of each channel, with pixels in 0..1.

    Exact up to the last float64 rounding, for it counts how often each of the 256 values occurs.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        Two tuples of C numbers. A channel that is constant gets a standard deviation of 1, which
        normalization can divide by.

    Example:
        >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2))
        ((0.5,), (0.5,))
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / counts.sum()
        means.append(mean.item())
        stds.append(variance.sqrt().item() or 1.0)
    return tuple(means), tuple(stds)
