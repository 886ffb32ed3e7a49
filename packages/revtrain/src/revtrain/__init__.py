"""Training of reversible networks on Hugging Face Accelerate."""

from revtrain.batch_size import find_batch_size
from revtrain.config import TrainConfig
from revtrain.dry_run import Plan, dry_run
from revtrain.evaluation import Evaluation, evaluate
from revtrain.memory import DepthCost, StepCost, compare_memory
from revtrain.net import NetSpec
from revtrain.recipe import Recipe, list_recipes, load_recipe
from revtrain.trainer import NonFiniteLossError, Result, train

__all__ = [
    "DepthCost",
    "Evaluation",
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
