"""Training of reversible networks on Hugging Face Accelerate."""

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
from revtrain.signals import Interrupted
from revtrain.trainer import train

__all__ = [
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
