"""The global random generators: what a branch drew, and drawing it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Draw(NamedTuple):
    """What a run did to one generator.

    Attributes:
        device: The generator's device.
        before: Its state before the run.
        after: Its state after the run.
    """

    device: torch.device
    before: Tensor
    after: Tensor


_CPU = torch.device("cpu")


def get_states(device: torch.device) -> list[tuple[torch.device, Tensor]]:
    """Reads the generators that code on `device` can draw from: its own and the CPU's.

    While a CUDA graph is being captured a generator's state cannot be read, and there is none to
    replay: see `RefuseRandomness`.
    """
    states = [(_CPU, torch.default_generator.get_state())]
    if device.type in ("cpu", "meta"):
        return states
    if is_capturing(device):
        return []
    return [*states, (device, _get_state(device))]


def is_capturing(device: torch.device) -> bool:
    """Tells whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def draws_since(states: list[tuple[torch.device, Tensor]]) -> list[Draw]:
    """Lists the generators that have moved since `states` were read."""
    draws = []
    for device, before in states:
        after = _get_state(device)
        if not _same(before, after):
            draws.append(Draw(device, before, after))
    return draws


class OtherDrawsError(Exception):
    """A repeated run has left a generator elsewhere than the first run did."""


@contextmanager
def draw_again(draws: list[Draw]) -> Iterator[None]:
    """Replays generators inside the context, and leaves them as they were.

    Raises:
        OtherDrawsError: If a generator ends elsewhere than the first time.
    """
    outside = [_get_state(device) for device, _, _ in draws]
    try:
        for device, before, _ in draws:
            _set_state(device, before)
        yield
        for device, before, after in draws:
            now = _get_state(device)
            # A state that did not move now was moved by another thread then: no harm.
            if not _same(now, after) and not _same(now, before):
                raise OtherDrawsError
    finally:
        for (device, _, _), state in zip(draws, outside, strict=True):
            _set_state(device, state)


class RefuseRandomness(TorchDispatchMode):
    """Raises on an operation of this thread that draws random numbers, as dropout does.

    Args:
        message: What the error says.
    """

    def __init__(self, message: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._message = message

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func}: {self._message}")
        return func(*args, **(kwargs or {}))


def _same(one: Tensor, other: Tensor) -> bool:
    # States are bytes, which torch compares one by one; eight at a time are quicker.
    return torch.equal(one.view(torch.int64), other.view(torch.int64))


def _generator(device: torch.device) -> torch.Generator | None:
    """Returns the default generator, which is asked faster than through torch's module."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return None


def _get_state(device: torch.device) -> Tensor:
    generator = _generator(device)
    if generator is not None:
        return generator.get_state()
    if device.type == "mps":
        return torch.mps.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_state(device: torch.device, state: Tensor) -> None:
    generator = _generator(device)
    if generator is not None:
        generator.set_state(state)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
