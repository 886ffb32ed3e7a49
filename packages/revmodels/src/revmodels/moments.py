"""Sums of a batch that a kernel leaves for the statistics of the batch that it has written."""

from __future__ import annotations

from torch import Tensor


class Moments:
    """What is known of a batch whose mean and variance somebody will want; nothing at first.

    The kernel that writes a batch has its values at hand, so it can add them up by tiles, which
    saves reading them once more.

    Attributes:
        sums: float32, shape `(2, tiles, C)`: the sum of each tile, and that of the squared
            deviations from the tile's own mean. None while nobody has added up anything.
        places: Places of a tile; the last one may have fewer.
    """

    sums: Tensor | None = None
    places: int = 0
