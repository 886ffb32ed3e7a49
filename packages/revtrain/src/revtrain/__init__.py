"""Training of reversible networks on Hugging Face Accelerate.

What is here is imported when it is first used: importing torch takes seconds, which the help of the
command line need not cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revtrain.batch_size import find_batch_size
    from revtrain.checkpoints import CheckpointError
    from revtrain.config import TrainConfig
    from revtrain.drift import DriftError
    from revtrain.evaluation import Evaluation, evaluate
    from revtrain.memory import DepthCost, StepCost, compare_memory
    from revtrain.net import NetSpec
    from revtrain.nonfinite import NonFiniteLossError
    from revtrain.plan import Plan, dry_run
    from revtrain.recipe import Recipe, list_recipes, load_recipe
    from revtrain.result import Result
    from revtrain.run_folder import BusyError
    from revtrain.signals import Interrupted
    from revtrain.trainer import train
else:
    _MODULES = {
        "BusyError": "run_folder",
        "CheckpointError": "checkpoints",
        "DepthCost": "memory",
        "DriftError": "drift",
        "Evaluation": "evaluation",
        "Interrupted": "signals",
        "NetSpec": "net",
        "NonFiniteLossError": "nonfinite",
        "Plan": "plan",
        "Recipe": "recipe",
        "Result": "result",
        "StepCost": "memory",
        "TrainConfig": "config",
        "compare_memory": "memory",
        "dry_run": "plan",
        "evaluate": "evaluation",
        "find_batch_size": "batch_size",
        "list_recipes": "recipe",
        "load_recipe": "recipe",
        "train": "trainer",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "BusyError",
    "CheckpointError",
    "DepthCost",
    "DriftError",
    "Evaluation",
    "Interrupted",
    "NetSpec",
    "NonFiniteLossError",
    "Plan",
    "Recipe",
    "Result",
    "StepCost",
    "TrainConfig",
    "compare_memory",
    "dry_run",
    "evaluate",
    "find_batch_size",
    "list_recipes",
    "load_recipe",
    "train",
]
