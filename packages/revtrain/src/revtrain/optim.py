"""From a recipe to torch.optim."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from revtrain.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Makes SGD over a model's parameters.

    Where the recipe decays weights only, biases and the scales and shifts of normalizations, which
    are the parameters with one dimension, form a group without decay.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if recipe.decay == "weights":
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    optimizer = SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        # Reads its rate, and whether to skip the step, from tensors on the device.
        fused=True,
    )
    if recipe.momentum:
        # Zeros are what the first step begins with anyhow; a tensor that is made in that step
        # would be left without a value by one that is skipped.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scheduler(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LRScheduler:
    """Makes the schedule of the learning rate, to be stepped once after each optimizer step."""
    if recipe.schedule == "one-cycle":
        return OneCycleLR(
            optimizer,
            max_lr=recipe.lr,
            total_steps=total_steps,
            pct_start=recipe.warmup,
            cycle_momentum=False,
        )
    milestones = [round(fraction * total_steps) for fraction in recipe.milestones]
    return MultiStepLR(optimizer, milestones, gamma=recipe.gamma)
