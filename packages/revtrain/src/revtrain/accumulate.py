"""A batch that is too large for the device goes through the network in parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def forward_backward(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """Leaves in the parameters the gradients of a batch's mean loss.

    The batch is made in `accelerator.gradient_accumulation_steps` equal parts, and processes
    exchange gradients after the last of them. For a network without batch statistics these are the
    gradients of the whole batch; batch normalization sees each part alone.

    Args:
        model: A prepared network.
        x: This process's images (N, C, H, W); N must be divisible by the number of parts.
        labels: Their labels (N,).
        criterion: Mean loss of logits and labels.
        accelerator: Runs the backward pass.

    Returns:
        The mean loss and the logits (N, K), without gradients.
    """
    parts = accelerator.gradient_accumulation_steps
    if parts == 1:
        logits = model(x)
        loss = criterion(logits, labels)
        accelerator.backward(loss)
        return loss.detach(), logits.detach()
    losses, outputs = [], []
    for x_part, labels_part in zip(x.chunk(parts), labels.chunk(parts), strict=True):
        with accelerator.accumulate(model):
            logits = model(x_part)
            loss = criterion(logits, labels_part)
            accelerator.backward(loss)  # divides by the number of parts
        losses.append(loss.detach())
        outputs.append(logits.detach())
    return torch.stack(losses).mean(), torch.cat(outputs)


def refuse_unequal_parts(batch_size: int, accelerator: Accelerator) -> None:
    """Raises if a process's share of a batch does not come out even.

    Raises:
        ValueError: The batch is not divisible by processes times parts.
    """
    processes, parts = accelerator.num_processes, accelerator.gradient_accumulation_steps
    if parts > 1 and batch_size % (processes * parts):
        raise ValueError(
            f"batch_size (={batch_size}) must be a multiple of {processes * parts}: accumulate "
            f"(={parts}) times the number of processes (={processes})"
        )
