"""Randomness without state: every draw is a hash of what it is drawn for.

A generator would have to be saved, restored and shared between processes. A hash of (seed, epoch,
sample) has nothing to restore: a run that was stopped, or goes on with another number of
processes, sees the same samples, and so does every device, for these are exact operations on
64-bit integers.

References:
    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a draw is for; different purposes give independent draws.
ORDER, CROP_ROW, CROP_COLUMN, FLIP, TRANSFORM, CUT_ROW, CUT_COLUMN = range(7)


def _signed(value: int) -> int:
    """Reads the lowest 64 bits of an integer as int64, which is what torch computes with."""
    return (value + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros, where int64's own `>>` copies the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def hash_integers(*keys: int, index: Tensor) -> Tensor:
    """Hashes (keys, index[i]) for every i.

    With equal keys, different indices never collide: the last step is a bijection of 64 bits.

    Args:
        *keys: Integers of any size; their lowest 64 bits count.
        index: int64 tensor of any shape, on any device.

    Returns:
        int64 tensor of the shape and device of `index`, uniform over all 64-bit integers.

    Example:
        >>> hash_integers(0, index=torch.arange(2))
        tensor([-6411193824288604561,   627405149472732430])
    """
    h = torch.zeros((), dtype=torch.int64, device=index.device)
    steps: list[int | Tensor] = [*map(_signed, keys), index]
    for key in steps:
        h = (h ^ key) + _GAMMA
        h = (h ^ _shift(h, 30)) * _MIX_1
        h = (h ^ _shift(h, 27)) * _MIX_2
        h = h ^ _shift(h, 31)
    return h


def random_below(bound: int, *keys: int, index: Tensor) -> Tensor:
    """Draws an integer in 0..bound-1 for every index, a pure function of (keys, index).

    Args:
        bound: Number of outcomes, far below 2^31 (the bias is at most bound / 2^31).
        *keys: As for `hash_integers`.
        index: int64 tensor of any shape.

    Returns:
        int64 tensor of the shape of `index`.
    """
    return _shift(hash_integers(*keys, index=index), 33) % bound


def epoch_order(
    size: int, *, seed: int, epoch: int, shuffle: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the order in which an epoch visits the samples, a pure function of (seed, epoch).

    Args:
        size: Number of samples.
        seed: Any integer.
        epoch: Any integer.
        shuffle: False gives 0, 1, 2, ...
        device: Where to compute it; the result is the same everywhere.

    Returns:
        int64 tensor (size,), a permutation of `range(size)`.

    Example:
        >>> epoch_order(5, seed=0, epoch=1, shuffle=True)
        tensor([3, 4, 0, 2, 1])
    """
    index = torch.arange(size, device=device)
    if not shuffle:
        return index
    return torch.argsort(hash_integers(seed, ORDER, epoch, index=index))


def rank_bounds(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns the part of the global batch [start, stop) that belongs to one rank.

    The parts of all ranks are contiguous, disjoint, and together the batch; their sizes differ by
    one at most, and a batch smaller than `world_size` leaves some ranks an empty part.

    Example:
        >>> [rank_bounds(100, 107, rank, 3) for rank in range(3)]
        [(100, 102), (102, 104), (104, 107)]
    """
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size
