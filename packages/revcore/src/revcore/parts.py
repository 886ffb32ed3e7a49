"""What a call of a chain is made of, and running it by the eager engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from revcore.arguments import Arguments
from revcore.coupling import Coupling
from revcore.engine import Call, run
from revcore.step import Step
from revcore.streams import Streams, as_streams

# A node of autograd takes some ten microseconds, which show where there is little to compute, so
# several blocks share one. It holds the gradients of its streams and parameters until it is done,
# which would show if there were many.
_STEPS_AT_ONCE = 64
_SMALL = 2**23  # bytes of all streams
_TINY = 2**10  # bytes of a block's parameters

_nbytes: Callable[[Tensor], int] = attrgetter("nbytes")
_requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad")


class Part(NamedTuple):
    """One block, or the coupling in it.

    Attributes:
        module: That.
        steps: Its steps; None if calling it does more than to run these.
        kept: Whether its input is kept.
    """

    module: Any
    steps: Sequence[Step] | None
    kept: bool = False


def run_parts(
    call: Call, parts: Sequence[Part], streams: Streams, kwargs: Arguments, *, inverted: bool
) -> Streams:
    """Runs parts as a part of a call.

    Args:
        call: The call.
        parts: In the order in which they run.
        streams: Their input.
        kwargs: Extra arguments of all branches.
        inverted: Whether the parts are on the way back.
    """
    # A shared node holds one gradient of each argument for each of its steps, too.
    small = sum(map(_nbytes, streams)) <= _SMALL and not any(map(_requires_grad, call.given))
    steps: list[Step] = []
    for part in parts:
        # With a node of its own for the last block, the peak is the same at any depth: only the
        # first gradients may take no memory, as those of a sum.
        shares = small and part is not parts[-1] and _is_tiny(part)
        if steps and (part.kept or not shares or len(steps) >= _STEPS_AT_ONCE):
            streams, steps = run(steps, streams, kwargs), []
        call.keeps |= part.kept
        if part.steps is None:
            streams = call_part(part, streams, kwargs, inverted=inverted)
            call.used.update(range(len(streams)))
        else:
            steps += part.steps
        if steps and not shares:
            streams, steps = run(steps, streams, kwargs), []
    return streams


def call_part(part: Part, streams: Streams, kwargs: Arguments, *, inverted: bool) -> Streams:
    """Calls the module of a part as somebody would who knows nothing of its steps."""
    module = part.module
    return as_streams((module.inverse if inverted else module)(*streams, **kwargs))


def _is_tiny(part: Part) -> bool:
    coupling = part.module
    if part.steps is None or not isinstance(coupling, Coupling):
        return False
    known: bool | None = coupling.__dict__.get("_tiny")
    if known is None:
        parameters = [p for p in coupling.parameters() if p.layout is torch.strided]
        if any(map(is_lazy, parameters)):
            return False
        # Not looked at again: if it grows, some memory is held a little longer.
        known = coupling.__dict__["_tiny"] = sum(map(_nbytes, parameters)) <= _TINY
    return known
