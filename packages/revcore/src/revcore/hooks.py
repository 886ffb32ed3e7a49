"""Hooks: who wants to see a module being called."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_GLOBAL = [vars(_module)[f"_global{name}"] for name in HOOKS]
# With what they tell of how hooks are called.
GLOBAL_TABLES: list[dict[int, Any]] = [
    *_GLOBAL,
    _module._global_forward_hooks_always_called,
    _module._global_forward_hooks_with_kwargs,
]


def has_hooks(module: nn.Module) -> bool:
    """Tells whether a module has hooks of its own."""
    own = vars(module)
    # Each by its name takes half of the time, for every block in every call.
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def has_global_hooks() -> bool:
    """Tells whether there are hooks on all modules."""
    return any(_GLOBAL)
