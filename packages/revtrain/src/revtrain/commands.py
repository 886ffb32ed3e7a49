"""What the commands do; `revtrain.cli` says how they are spelled, without importing torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from revdata import DataError
from revtrain.batch_size import find_batch_size
from revtrain.checkpoints import CheckpointError
from revtrain.config import Precision, TrainConfig
from revtrain.drift import DriftError
from revtrain.ending import end_with
from revtrain.evaluation import evaluate as evaluate_run
from revtrain.launch import LaunchError
from revtrain.nonfinite import NonFiniteLossError
from revtrain.plan import dry_run, print_plan
from revtrain.report import print_result
from revtrain.run_folder import BusyError
from revtrain.signals import Interrupted
from revtrain.trainer import Trainer

# What bad input raises: wrong values, missing or existing files. Only where input is checked is it
# caught; the same error from the training loop is a defect and keeps its traceback.
_BAD_INPUT = (ValueError, OSError, LaunchError, DataError, CheckpointError)

# A full disk or quota, or a file too large, is no defect; the files written so far are whole.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train(config: TrainConfig) -> None:
    """Trains and prints the result."""
    with _ending_together():
        try:
            trainer = Trainer(config)
        except _BAD_INPUT as error:
            end_with(error, 2)
        try:
            result = trainer.run()
        except (NonFiniteLossError, DriftError) as error:
            end_with(error, 1)
        except BusyError as error:
            end_with(error, 2)
        except CheckpointError as error:  # the first; later ones do not end a run
            end_with(
                CheckpointError(f"{error}: make room, or choose another run folder by --out"), 1
            )
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            end_with(
                OSError(f"{error}: make room, then go on by the same command with --resume"), 1
            )
        if trainer.accelerator.is_main_process:
            print_result(result)


def plan(config: TrainConfig) -> None:
    """Prints what training would be."""
    with _ending_together():
        try:
            found = dry_run(config)
        except _BAD_INPUT as error:
            end_with(error, 2)
        if _is_first():
            print_plan(found)


def evaluate(
    run: Path,
    *,
    data: str | None,
    data_dir: Path | None,
    cpu: bool,
    mixed_precision: Precision | None,
) -> None:
    """Evaluates a run and prints its accuracy."""
    with _ending_together():
        try:
            result = evaluate_run(
                run,
                data=data,
                data_dir=data_dir,
                cpu=cpu,
                mixed_precision=mixed_precision,
                progress=True,
            )
        except _BAD_INPUT as error:
            end_with(error, 2)
        if _is_first():
            print(
                f"{result.data} {result.split} accuracy {result.accuracy:.2%} "
                f"({result.images:,} images, loss {result.loss:.4f})"
            )


def find_batch(config: TrainConfig, *, largest: int) -> None:
    """Finds the largest batch that fits and prints it."""
    try:
        size = find_batch_size(config, largest=largest)
    except _BAD_INPUT as error:
        end_with(error, 2)
    print(
        f"{size} images fit (of {largest} and its halves): --batch-size {size}, times the number "
        "of processes"
    )


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _ending_together() -> Iterator[None]:
    """Lets all processes end at once, where they have come to the end or to one agreed stop."""
    stop: Interrupted | None = None
    try:
        yield
    except Interrupted as caught:  # on all processes
        stop = caught
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Together: on the CPU a process can wait forever for another that has closed its end.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if stop is not None:
        raise stop
