"""The autocast state of a call, and calling again under the same.

States are set directly: what `torch.autocast` does around that is for its users, and this happens
for each branch in each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Autocast = tuple[tuple[str, torch.dtype], ...]
"""The kinds of device whose operations are cast, and to which dtype."""


def autocast_now(kinds: Sequence[str]) -> Autocast:
    """Reads the states that matter to code on some kinds of device."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
    )


class no_autocast_cache:  # noqa: N801 - used as a function
    """Casts anew each time, and lets nothing else find what was cast."""

    def __enter__(self) -> None:
        self._cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_cache_enabled(self._cache)


class autocast_as(no_autocast_cache):  # noqa: N801 - used as a function
    """Restores autocast states, with a cache that nothing outside shares.

    A weight that was cast without grad mode must not be found by code that needs its gradient,
    and one cast in a recomputation must not be found by the next, whose graph is another one.

    Args:
        states: Those wanted.
        kinds: The kinds of device that they are for.
    """

    def __init__(self, states: Autocast, kinds: Sequence[str]) -> None:
        self._wanted = dict(states)
        self._kinds = kinds

    def __enter__(self) -> None:
        super().__enter__()
        self._before = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self._kinds
        ]
        for kind, enabled, dtype in self._before:
            wanted = self._wanted.get(kind)
            if enabled is not (wanted is not None):
                torch.set_autocast_enabled(kind, wanted is not None)
            if wanted is not None and wanted is not dtype:
                torch.set_autocast_dtype(kind, wanted)

    def __exit__(self, *_: object) -> None:
        for kind, enabled, dtype in self._before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        super().__exit__()
