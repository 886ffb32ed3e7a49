"""One optimizer step; nothing in it waits for the device."""

from __future__ import annotations

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn

from revtrain.accumulate import forward_backward
from revtrain.meter import Meter


class TrainStep:
    """Takes optimizer steps with a prepared network.

    Args:
        model: What `accelerator.prepare` made of the network; so the optimizer and the scheduler.
        optimizer: Changes the weights.
        scheduler: Changes the learning rate, once a step.
        accelerator: Runs the backward pass.
        label_smoothing: Share of the target that is spread evenly over all classes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        scheduler: AcceleratedScheduler,
        accelerator: Accelerator,
        *,
        label_smoothing: float,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._accelerator = accelerator
        self._label_smoothing = label_smoothing

    def __call__(self, x: Tensor, labels: Tensor, meter: Meter) -> None:
        """Takes one step on this process's slice of a batch, and adds its loss to `meter`."""
        loss, logits = forward_backward(
            self._model, x, labels, self._cross_entropy, self._accelerator
        )
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        meter.update(loss, logits, labels)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
