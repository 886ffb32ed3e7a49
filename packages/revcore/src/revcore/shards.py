"""What to do where FSDP has taken the parameters of a branch that is to run again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def explain(error: RuntimeError, branches: Iterable[tuple[str, Sequence[Tensor]]]) -> None:
    """Says of an error in a backward pass what to do, if its cause is that parameters are sharded.

    Args:
        error: The error.
        branches: The names of branches' classes, with their parameters as first runs found them.

    Raises:
        RuntimeError: Another one, if that is the cause.
    """
    for name, parameters in branches:
        if any(map(_is_freed, parameters)):
            raise RuntimeError(
                f"the parameters of branch {name} were freed before it could run again, as "
                "fully_shard does after a block whose output no gradient comes through. Use "
                "fully_shard(block, reshard_after_forward=False), or a loss that needs the output "
                "of every block."
            ) from error
        if "DTensor" in str(error) and any(type(p).__name__ == "DTensor" for p in parameters):
            raise RuntimeError(
                f"the parameters of {name} are sharded where it is to run again: fully_shard was "
                "applied to that very module. Apply it to the module that calls the chain or "
                "revcore.recompute, or to a ReversibleBlock."
            ) from error


def _is_freed(parameter: Tensor) -> bool:
    if parameter.is_meta or type(parameter).__name__ == "DTensor" or not parameter.numel():
        return False
    try:
        return parameter.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # wraps others
        return False
