"""The largest batch that fits into the memory of a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import find_executable_batch_size

import revdata
from revtrain.config import TrainConfig
from revtrain.launch import make_accelerator
from revtrain.meter import Meter
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.step import TrainStep


def find_batch_size(config: TrainConfig, *, largest: int = 8192) -> int:
    """Finds the largest batch of a process that fits, among a number and its halves.

    Takes training steps on noise, so it needs no data. `config.batch_size` plays no part.

    Args:
        config: The network, the data set that gives the shape of its images, and the precision.
        largest: Where to begin.

    Returns:
        Images per step of one process.

    Raises:
        ValueError: There is no GPU, there are several processes, or nothing fits.
        revdata.DataError: The data set has no such name.
    """
    if largest < 1:
        raise ValueError(f"largest (={largest}) must be at least 1")
    info = revdata.describe(config.data)
    spec = NetSpec.of(
        config.model,
        config.num_classes or info.num_classes,
        info.shape[0],
        config.blocks,
        config.channels,
    )
    accelerator = make_accelerator(cpu=config.cpu, mixed_precision=config.mixed_precision)
    device = accelerator.device
    if _without_limit(device):
        raise ValueError(
            "the largest batch can be found on a GPU alone: a CPU's memory has no such limit, and "
            "the system slows down or ends the process; choose --batch-size by --dry-run instead"
        )
    if accelerator.num_processes > 1:
        raise ValueError("the largest batch is found by one process: start one, on one GPU")
    model = to_device(spec.build(reversing=not config.stored, recompute=config.recompute), device)
    recipe = config.resolved_recipe
    optimizer = make_optimizer(model, recipe)
    model, optimizer, scheduler = accelerator.prepare(
        model, optimizer, make_scheduler(optimizer, recipe, 1)
    )

    def train(batch_size: int) -> None:
        x = torch.randn(batch_size, *info.shape, device=device)
        x = x.contiguous(memory_format=memory_format(device))
        labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        step = TrainStep(model, optimizer, scheduler, accelerator, label_smoothing=0.0, graph=False)
        step(x, labels, Meter(device))

    return largest_that_runs(train, largest)


def _without_limit(device: torch.device) -> bool:
    return device.type == "cpu"


def largest_that_runs(train: Callable[[int], None], largest: int) -> int:
    """Calls `train` with `largest` and its halves until it does not run out of memory.

    Raises:
        ValueError: Not even 1 runs.
    """
    size = largest

    def halve() -> int:
        nonlocal size
        size //= 2
        return size

    def attempt(batch_size: int) -> int:
        train(batch_size)
        return batch_size

    search = find_executable_batch_size(
        attempt, starting_batch_size=largest, reduce_batch_size_fn=halve
    )
    try:
        found: int = search()
    except RuntimeError as error:
        if size:  # it ended for another reason than memory
            raise
        raise ValueError("not even a batch of one image fits into the device's memory") from error
    return found
