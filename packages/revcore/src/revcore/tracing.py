"""Whether torch traces what runs: for torch.compile, or for export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Older releases of torch only tell that they compile, which newer ones do of the whole process:
# another thread may run eagerly meanwhile.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

_dynamo: Any = torch._C._dynamo.eval_frame


def never_alone(function: Callable[..., Any]) -> None:
    """Lets Dynamo trace a function as a part of others, and never by itself.

    After a graph break it would go on with the functions inside, each of which finds that it is
    traced.
    """
    if hasattr(_dynamo, "set_code_exec_strategy"):  # where releases of torch can trace a chain
        skip, default = _dynamo._FrameAction.SKIP, _dynamo._FrameAction.DEFAULT
        strategy = _dynamo._FrameExecStrategy(skip, default)
        _dynamo.set_code_exec_strategy(function.__code__, strategy)


def is_traced() -> bool:
    """Tells whether this code is being traced."""
    return torch.compiler.is_dynamo_compiling() or bool(_is_exporting())


never_alone(is_traced)
