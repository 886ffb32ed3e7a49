"""The global random generators: their states, and drawing the same numbers again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import string_at
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class State(NamedTuple):
    """The state of a device's generator. Equal states that were read in turn are one object."""

    device: torch.device
    state: Any
    content: Any


States = list[State]

NO_STATES: States = []

_CPU = torch.device("cpu")

# The state that was read last, by device. A state of the CPU's generator takes 5 kB, and most
# branches draw nothing, so all of a chain can share one.
_last: dict[torch.device, State] = {}


def get_states(devices: Sequence[torch.device]) -> States:
    """Reads the generators that code on some devices can draw from: theirs and the CPU's.

    While a CUDA graph is being captured a generator's state cannot be read, and there is none to
    replay: see `RefuseRandomness`.
    """
    others = [device for device in devices if device.type not in ("cpu", "meta")]
    if any(map(is_capturing, others)):
        return []
    return [_read(_CPU), *map(_read, others)]


def set_states(states: States) -> None:
    """Sets generators to states that were read."""
    for device, state, _ in states:
        _set(device, state)


def _is_either(one: State, two: State) -> bool:
    """Tells whether a generator is in one of two states, which were read in turn."""
    return _content(_get(one.device)) in (two.content, one.content)


def is_capturing(device: torch.device) -> bool:
    """Tells whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def draw_again(before: States, after: States, run: Callable[[], Tensor], message: str) -> Tensor:
    """Runs something with the numbers that it drew before, and leaves generators as they were.

    Args:
        before: The generators before the first run.
        after: The generators after it.
        run: The second run.
        message: What the error says.

    Raises:
        RuntimeError: If it draws other numbers than the first time.
    """
    outside = [(state.device, _get(state.device)) for state in before]
    try:
        set_states(before)
        t = run()
        # A state that did not move now was moved by another thread then: no harm.
        if all(map(_is_either, before, after)):
            return t
    finally:
        for device, state in outside:
            _set(device, state)
    # The draws may have been another thread's, which is no harm if these are all.
    with RefuseRandomness(message):
        return run()


class RandomnessError(RuntimeError):
    """Random numbers were drawn where they must not be."""


class RefuseRandomness(TorchDispatchMode):
    """Raises on an operation of this thread that draws random numbers, as dropout does.

    Args:
        message: What the error says.
    """

    def __init__(self, message: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._message = message

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            # Of an attention, which may draw none.
            if argument_of(func, "dropout_p", args, kwargs) == 0:
                return func(*args, **kwargs)
            raise RandomnessError(f"{func}: {self._message}")
        return func(*args, **kwargs)


def argument_of(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Returns an argument of an operation of torch; None if it has none of this name."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            given = args[position] if position < len(args) else argument.default_value
            return (kwargs or {}).get(name, given)
    return None


def _read(device: torch.device) -> State:
    state = _get(device)
    content = _content(state)
    last = _last.get(device)
    if last is None or last[2] != content:
        last = _last[device] = State(device, state, content)
    return last


def _content(state: Any) -> Any:
    # Python compares bytes faster than torch compares tensors.
    return string_at(state.data_ptr(), state.numel()) if isinstance(state, Tensor) else state


def _get(device: torch.device) -> Any:
    # The default generators are asked faster than through torch's modules.
    if device is _CPU:
        return torch.default_generator.get_state()
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
        return generator.initial_seed(), generator.get_offset()
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set(device: torch.device, state: Any) -> None:
    if device is _CPU:
        torch.default_generator.set_state(state)
    elif device.type == "cuda":
        generator, (seed, offset) = torch.cuda.default_generators[device.index], state
        if generator.initial_seed() != seed:
            generator.manual_seed(seed)
        generator.set_offset(offset)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
