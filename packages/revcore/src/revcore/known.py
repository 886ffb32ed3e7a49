"""What is known of classes of modules, so that it need not be looked for each time they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=type[nn.Module])

# Modules that draw nothing, and do the same in training and in evaluation.
_PLAIN: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.Sequential, nn.ModuleList),
        *(nn.LayerNorm, nn.GroupNorm, nn.Flatten, nn.Unflatten, nn.ZeroPad2d),
        *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus),
    }
)

# These read their running statistics only in evaluation. Subclasses may use their buffers in other
# ways.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_KNOWN = _PLAIN.union(BATCH_NORMS)

# What runs when they are called, which somebody may replace.
CODE = ("forward", "_conv_forward")


def _code_of(kind: Any) -> list[Any]:
    return [getattr(kind, name, None) for name in CODE]


_FOUND = {kind: _code_of(kind) for kind in _KNOWN}

# Modules whose results come from what they hold and from their arguments alone. The list need not
# be complete.
CONTAINED: set[type[nn.Module]] = {*_KNOWN}


def self_contained(module: M) -> M:
    """Declares that the `forward` of a class of modules has nothing to do with anything outside.

    It draws no random numbers, uses no tensors but its arguments, its own parameters and buffers
    and those of the modules inside, and leaves no results in attributes. Around each run of a
    branch that is made of such modules the generators are then not read and set, and only its first
    graph is looked through for tensors that would get no gradient. It says nothing of the modules
    inside, which are looked at themselves, nor of subclasses. A class of which it is not true gets
    wrong gradients.

    Args:
        module: The class.

    Returns:
        The same class.

    Raises:
        TypeError: If `module` is no class.

    Example:
        >>> @self_contained
        ... class Square(nn.Module):
        ...     def forward(self, x):
        ...         return x * x
    """
    if not isinstance(module, type):
        raise TypeError(
            f"module must be a class, got an object of {type(module).__name__}; decorate its class"
        )
    CONTAINED.add(module)
    return module


def are_self_contained(modules: Sequence[nn.Module]) -> bool:
    """Tells whether these modules are known to use nothing from elsewhere."""
    return all(
        type(module) in CONTAINED
        and not _is_changed(module)
        # Such as a weight that another net has made.
        and not any(isinstance(value, Tensor) for value in module.__dict__.values())
        for module in modules
    )


def is_plain(module: nn.Module) -> bool:
    """Tells whether a module is known to do the same in training and in evaluation."""
    return type(module) in _PLAIN and not _is_changed(module)


def is_known(module: nn.Module) -> bool:
    """Tells whether a module is torch's own, and of those that use nothing but what they hold."""
    return type(module) in _KNOWN and not _is_changed(module)


def _is_changed(module: nn.Module) -> bool:
    """Tells whether something else runs with a module, or in its place."""
    kind: Any = type(module)
    return (
        bool(module._forward_hooks or module._forward_pre_hooks)
        or any(name in module.__dict__ for name in CODE)
        or (kind in _KNOWN and _code_of(kind) != _FOUND[kind])
    )
