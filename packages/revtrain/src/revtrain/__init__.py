"""Training of reversible networks on Hugging Face Accelerate."""

from revtrain.checkpoints import CheckpointError
from revtrain.config import TrainConfig
from revtrain.evaluation import Evaluation, evaluate
from revtrain.memory import DepthCost, StepCost, compare_memory
from revtrain.net import NetSpec
from revtrain.recipe import Recipe, list_recipes, load_recipe
from revtrain.signals import Interrupted
from revtrain.trainer import NonFiniteLossError, Result, train

__all__ = [
    "CheckpointError",
    "DepthCost",
    "Evaluation",
    "Interrupted",
    "NetSpec",
    "NonFiniteLossError",
    "Recipe",
    "Result",
    "StepCost",
    "TrainConfig",
    "compare_memory",
    "evaluate",
    "list_recipes",
    "load_recipe",
    "train",
]
