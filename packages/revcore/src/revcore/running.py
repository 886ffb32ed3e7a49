"""Calling a branch, and refusing one whose result could not be reversed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal

from revcore.arguments import Arguments
from revcore.remember import Memory, thread


def run_branch(
    call: Callable[..., Any], x: Tensor, kwargs: Arguments, memory: Memory | None = None
) -> Tensor:
    """Calls a branch, and refuses one whose result could not be reversed.

    Args:
        call: Runs the branch.
        x: Its input.
        kwargs: Its extra arguments.
        memory: What `revcore.remember` in the branch asks, if there are two runs; None for that of
            a branch around it.

    Raises:
        TypeError: If the branch returns anything but a tensor.
        RuntimeError: If the branch changes its input in place, or cannot run twice.
    """
    counted = not x.is_inference()
    before = x._version if counted else 0
    t = call(x, **kwargs) if memory is None else _remembering(call, x, kwargs, memory)
    if not isinstance(t, Tensor):
        raise TypeError(f"branch {_name(call)} must return one tensor, got {type(t).__name__}")
    if counted and x._version != before:
        raise RuntimeError(
            f"branch {_name(call)} changes its input in place, which destroys the stream that it "
            "reads. Start the branch with an operation that is not in place, such as "
            "nn.ReLU(inplace=False)."
        )
    return t


def _remembering(call: Callable[..., Any], x: Tensor, kwargs: Arguments, memory: Memory) -> Any:
    outer = thread.memory
    memory.outer, memory.position, thread.memory = outer, 0, memory
    # A weight that parametrize.cached() keeps from one run would have no graph in the other. Taken
    # off and added again, because torch counts so, and another thread may do the same meanwhile.
    cached = parametrize._cache_enabled
    if cached:
        _refuse_parametrizations_with_state(getattr(call, "__self__", call))
    parametrize._cache_enabled -= cached
    try:
        t = call(x, **kwargs)
        memory.close()
    finally:
        thread.memory = outer
        parametrize._cache_enabled += cached
    return t


def _refuse_parametrizations_with_state(module: Any) -> None:
    """Raises for one that would change its state once in a cache, and here in each call."""
    for part in module.modules() if isinstance(module, nn.Module) else ():
        state = part.parametrizations if parametrize.is_parametrized(part) else None
        parts = state.modules() if isinstance(state, nn.Module) and state.training else ()
        # The buffer of an orthogonal one stays as it is.
        if any(each._buffers and not isinstance(each, _Orthogonal) for each in parts):
            raise RuntimeError(
                f"a reversible branch cannot use what parametrize.cached() keeps, and a "
                f"parametrization of {type(part).__name__} has buffers, as spectral_norm has, "
                "which would then change in every call. Leave cached() away, or store the "
                "activations: revcore.set_reversing(model, False)."
            )


def _name(call: Callable[..., Any]) -> str:
    return type(getattr(call, "__self__", call)).__name__
