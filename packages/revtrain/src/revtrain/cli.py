"""The command line: `python -m revtrain`, `accelerate launch -m revtrain`."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import torch
from cyclopts import App, CycloptsError, Parameter

from revdata import DataError
from revtrain.batch_size import find_batch_size
from revtrain.checkpoints import CheckpointError
from revtrain.config import TrainConfig
from revtrain.drift import DriftError
from revtrain.evaluation import evaluate
from revtrain.launch import LaunchError
from revtrain.listing import print_lists
from revtrain.nonfinite import NonFiniteLossError
from revtrain.plan import dry_run as make_plan
from revtrain.plan import print_plan
from revtrain.recipe_flags import RecipeFlags, given
from revtrain.report import print_result
from revtrain.signals import Interrupted
from revtrain.trainer import Trainer

app = App(
    name="revtrain",
    help="Train reversible networks on images, in activation memory that does not grow with depth.",
    default_parameter=Parameter(negative=()),
    version_flags=["--version"],
)

# What bad input raises: wrong values, missing or existing files. Only where input is checked is it
# caught; the same error from the training loop is a defect and keeps its traceback.
_BAD_INPUT = (ValueError, OSError, LaunchError, DataError, CheckpointError)

# A full disk or quota, or a file too large, is no defect; the files written so far are whole.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# How an option that an error of revdata names to its Python callers is spelled here.
_FLAGS = {
    "set REVDATA_DIR (or root)": "set REVDATA_DIR (or --data-dir)",
    "download=True": "--download",
    "verify=False": "--no-verify",
    "name a mirror": "name a mirror (--mirror)",
    "name another mirror": "name another mirror (--mirror)",
}

_Config = Annotated[TrainConfig | None, Parameter(name="*")]
_Flags = Annotated[RecipeFlags | None, Parameter(name="*", group="Recipe")]


@app.command(name="train")
def train_command(config: _Config = None, flags: _Flags = None, *, dry_run: bool = False) -> None:
    """Train a network and write its run folder.

    Ends with the test accuracy, the time per step and, for the reversible networks, the memory of
    activations against the same network with stored activations. The run folder holds config.json,
    metrics.jsonl (one line an epoch), model.safetensors, summary.json, memory.json and the pictures
    curve.svg and memory.svg (and .png).

    SIGTERM and Ctrl-C stop it after the next step, with a checkpoint and status 143 or 130; the
    same command with --resume goes on, after kill -9 too, to the same result.

    Several processes: accelerate launch --num_processes N -m revtrain train ...; on CPU:
    torchrun --nproc-per-node N -m revtrain train --cpu ...

    Args:
        config: What to train, on what, and how.
        flags: Other values than the recipe's.
        dry_run: Check everything, measure one step, print parameters, memory and steps, and write
            nothing.
    """
    try:
        chosen = _chosen(config, flags)
        if dry_run:
            plan = make_plan(chosen)
            if _is_first():
                print_plan(plan)
            return
        trainer = Trainer(chosen)
    except _BAD_INPUT as error:
        _stop(error, 2)
    try:
        result = trainer.run()
    except (NonFiniteLossError, DriftError) as error:
        _stop(error, 1)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        _stop(OSError(f"{error}: make room, then go on by the same command with --resume"), 1)
    if trainer.accelerator.is_main_process:
        print_result(result)


@app.command(name="evaluate")
def evaluate_command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    data: str | None = None,
    data_dir: Path | None = None,
    cpu: bool = False,
) -> None:
    """Evaluate a finished run again: the same weights give the same accuracy.

    Args:
        run: The run folder.
        data: Another data set than the one that the run was trained on.
        data_dir: Folder of the data. Default: the one that the run was given.
        cpu: Evaluate on the CPU even where there is an accelerator.
    """
    try:
        result = evaluate(run, data=data, data_dir=data_dir, cpu=cpu)
    except _BAD_INPUT as error:
        _stop(error, 2)
    if _is_first():
        print(
            f"{result.data} {result.split} accuracy {result.accuracy:.2%} "
            f"({result.images:,} images, loss {result.loss:.4f})"
        )


@app.command(name="list")
def list_command() -> None:
    """List the networks, the data sets and the recipes."""
    print_lists()


@app.command(name="find-batch")
def find_batch_command(
    config: _Config = None, flags: _Flags = None, *, largest: int = 8192
) -> None:
    """Find the largest batch whose training step fits into the GPU's memory.

    Tries a number and its halves, in the network and precision that the flags of train choose, by
    Accelerate's find_executable_batch_size. Needs no data.

    Args:
        config: What would be trained.
        flags: Other values than the recipe's.
        largest: Where to begin.
    """
    try:
        size = find_batch_size(_chosen(config, flags), largest=largest)
    except _BAD_INPUT as error:
        _stop(error, 2)
    print(
        f"{size} images fit (of {largest} and its halves): --batch-size {size}, times the number "
        "of processes"
    )


def _chosen(config: TrainConfig | None, flags: RecipeFlags | None) -> TrainConfig:
    """Joins the flags of both kinds."""
    return replace(config or TrainConfig(), overrides=given(flags))


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def main() -> None:
    """Runs the command line; bad input ends it with one line on stderr and exit status 2."""
    try:
        command, arguments, _ = app.parse_args(sys.argv[1:], exit_on_error=False, print_error=False)
    except (CycloptsError, *_BAD_INPUT) as error:
        _stop(error, 2)
    stop: Interrupted | None = None
    try:
        command(*arguments.args, **arguments.kwargs)
    except Interrupted as caught:  # on all processes
        stop = caught
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Together: on the CPU a process can wait forever for another that has closed its end.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if stop is not None:
        raise stop


def _stop(error: Exception, status: int) -> NoReturn:
    """Prints an error in one line and exits.

    Every process prints its own: the launcher kills the others as soon as one has exited.
    """
    message = " ".join(str(error).split())
    for option, flag in _FLAGS.items():
        message = message.replace(option, flag)
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
