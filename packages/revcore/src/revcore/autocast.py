"""The autocast state of a call, and calling again under the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """The autocast state of one kind of device.

    Attributes:
        device_type: Such as `"cuda"`.
        enabled: Whether operations are cast.
        dtype: To what they are cast.
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype


def autocast_now(device_type: str) -> list[Autocast]:
    """Reads the states that matter to code on a kind of device: its own and the CPU's."""
    kinds = ("cpu",) if device_type in ("cpu", "meta") else ("cpu", device_type)
    return [
        Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
    ]


@contextmanager
def autocast_as(states: list[Autocast]) -> Iterator[None]:
    """Restores autocast states, with a cache that nothing outside shares.

    A weight that was cast without grad mode must not be found by code that needs its gradient,
    and one cast in a recomputation must not be found by the next, whose graph is another one.
    """
    cache = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        for state in states:
            if state.enabled or torch.is_autocast_enabled(state.device_type):
                stack.enter_context(
                    torch.autocast(state.device_type, dtype=state.dtype, enabled=state.enabled)
                )
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cache)
