"""What is known of classes of modules, so that it need not be looked for each time they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from torch import Tensor, nn

from revcore.hooks import has_global_hooks, has_hooks
from revcore.surroundings import PLAIN

M = TypeVar("M", bound=type[nn.Module])

# Subclasses may use their buffers in other ways than these.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

# The list need not be complete.
_OF_TORCH: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.Sequential, nn.ModuleList),
    *(nn.LayerNorm, nn.GroupNorm, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, *BATCH_NORMS),
    *_DROPOUTS,
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus),
)

_PARAMETERS = {"weight", "bias"}

_KINDS = PLAIN | {type(None)}

# What runs when a module is called, which somebody may replace.
_CODE = ("forward", "_conv_forward")


_Read = Callable[[type[nn.Module]], Any]


def _code_of(kind: type[nn.Module]) -> tuple[_Read, Any]:
    """Returns how to read the code of a class, and what that is now."""
    read = attrgetter(*(name for name in _CODE if hasattr(kind, name)))
    return read, read(kind)


# Modules whose results come from what they hold and from their arguments alone, with their code.
_contained = {kind: _code_of(kind) for kind in _OF_TORCH}


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
        TypeError: If `module` is no class of modules.

    Example:
        >>> @self_contained
        ... class Square(nn.Module):
        ...     def forward(self, x):
        ...         return x * x
    """
    kind: Any = module
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(
            f"module must be a class of modules, got {module!r:.80}; decorate its class"
        )
    _contained[module] = _code_of(module)
    return module


def is_as_declared(kind: type[nn.Module]) -> bool:
    """Tells whether a class is known, and runs the code that it ran then."""
    read, code = _contained.get(kind, (None, None))
    return read is not None and read(kind) == code


def is_self_contained(module: nn.Module) -> bool:
    """Tells whether a module is known to use nothing from elsewhere, but for modules inside."""
    kind = type(module)
    return (
        is_as_declared(kind)
        and not has_hooks(module)
        and not has_global_hooks()
        and not any(name in vars(module) for name in _CODE)
        # Others are put in by code around it, which may change them in each run.
        and (kind not in _OF_TORCH or module._parameters.keys() <= _PARAMETERS)
        # Such as a weight that another net has made.
        and not any(isinstance(value, Tensor) for value in vars(module).values())
        # Others may do anything in an operation.
        and _KINDS.issuperset(map(type, module._parameters.values()))
        and _KINDS.issuperset(map(type, module._buffers.values()))
    )


def draw(modules: Sequence[nn.Module]) -> bool:
    """Tells whether modules that are self-contained, or torch's own, draw random numbers."""
    return any(type(module) in _DROPOUTS and module.training for module in modules)


def are_of_torch(modules: Sequence[nn.Module]) -> bool:
    """Tells whether modules are torch's own, and self-contained."""
    return all(type(module) in _OF_TORCH and is_self_contained(module) for module in modules)
