"""Buffers of branches, of which copies are kept where a run may change them.

Most changes of a tensor are counted by torch. `F.batch_norm` does not count those of running
statistics, nor does anybody those of `.data`. So small buffers are copied before each run, and
larger ones, such as a mask, until it is known of them that they stay as they are: copies of them in
each block would be memory that grows with depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from revcore.randomness import is_capturing
from revcore.versions import version

# Bytes. Vectors may be statistics, which `F.batch_norm` may begin to change at any time.
_LARGE = 2**11
_LARGE_VECTOR = 2**16

# What runs have done with large buffers, by the training flag of their module: the version at which
# one was left alone, or None if one was changed without being counted.
_known: Any = WeakIdKeyDictionary()


class Copy(NamedTuple):
    """A buffer before a run.

    Attributes:
        buffer: The buffer.
        training: The flag of its module; None for a tensor that is an attribute instead.
        version: Its version.
        copy: A copy of it.
    """

    buffer: Tensor
    training: bool | None
    version: int
    copy: Tensor

    def has_moved(self) -> bool:
        """Tells whether the run has changed it, as far as the host can ask."""
        buffer, _, count, copy = self
        if version(buffer) != count:
            return True
        # Sparse ones cannot be compared.
        if buffer.is_meta or buffer.layout is not torch.strided or is_capturing(buffer.device):
            return False
        try:
            if torch.equal(buffer, copy):
                return False
            # As numbers go, what is none is not equal to itself.
            same = (buffer == copy) | (buffer.isnan() & copy.isnan())
            return not bool(same.all())
        except (NotImplementedError, RuntimeError):  # of a dtype that cannot be compared
            return True


def is_large(buffer: Tensor) -> bool:
    """Tells whether a buffer is looked at before it is copied each time."""
    vector = buffer.dim() < 2 and buffer.is_floating_point()
    return buffer.numel() * buffer.element_size() > (_LARGE_VECTOR if vector else _LARGE)


def stays(buffer: Tensor, training: bool | None) -> bool:
    """Tells whether a buffer is one that runs leave alone, by the flag of its module."""
    return is_large(buffer) and _known.get(buffer, {}).get(training) == version(buffer)


def copy_always(buffers: Sequence[Tensor]) -> None:
    """Says that any run may change buffers."""
    for buffer in filter(is_large, buffers):
        _known[buffer] = {True: None, False: None}


def is_settled(buffer: Tensor, training: bool | None) -> bool:
    """Tells whether a buffer is one to copy each time."""
    return not is_large(buffer) or _known.get(buffer, {}).get(training, 0) is None


def copy_all(buffers: Sequence[tuple[Tensor, bool | None]]) -> list[Copy]:
    """Copies buffers before a run."""
    return [Copy(buffer, flag, version(buffer), buffer.clone()) for buffer, flag in buffers]


def settle(copies: Sequence[Copy]) -> tuple[list[Copy], list[Copy]]:
    """Parts buffers after a run in those of which copies are needed, and those that stay."""
    needed, still = [], []
    for each in copies:
        buffer, training, count, _ = each
        if is_settled(buffer, training) or is_capturing(buffer.device) or version(buffer) != count:
            needed.append(each)
        elif each.has_moved():
            _known.setdefault(buffer, {})[training] = None
            needed.append(each)
        else:
            _known.setdefault(buffer, {})[training] = count
            still.append(each._replace(copy=buffer))  # so that the copy is gone
    return needed, still
