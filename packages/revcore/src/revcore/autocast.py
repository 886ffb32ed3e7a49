"""The autocast state of a call, and calling again under the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

Autocast = tuple[tuple[str, torch.dtype], ...]
"""The kinds of device whose operations are cast, and to which dtype."""


def autocast_now(device_type: str) -> Autocast:
    """Reads the states that matter to code on a kind of device: its own and the CPU's."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    kinds = ("cpu",) if device_type in ("cpu", "meta") else ("cpu", device_type)
    return tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
    )


@contextmanager
def autocast_as(states: Autocast, device_type: str) -> Iterator[None]:
    """Restores autocast states, with a cache that nothing outside shares.

    A weight that was cast without grad mode must not be found by code that needs its gradient,
    and one cast in a recomputation must not be found by the next, whose graph is another one.
    """
    now, wanted = dict(autocast_now(device_type)), dict(states)
    with ExitStack() as stack:
        for kind in {**now, **wanted}:
            if now.get(kind) != wanted.get(kind):
                changed = torch.autocast(kind, dtype=wanted.get(kind), enabled=kind in wanted)
                stack.enter_context(changed)
        stack.enter_context(no_autocast_cache())
        yield


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Casts anew each time, and lets nothing else find what was cast."""
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache)
