"""The command line: `python -m revtrain`, `accelerate launch -m revtrain`.

Nothing here imports torch: help, and what is wrong with a flag, should not wait for it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from revtrain.config import Precision, TrainConfig
from revtrain.ending import end_with
from revtrain.recipe_flags import RecipeFlags, given

app = App(
    name="revtrain",
    help="Train reversible networks on images, in activation memory that does not grow with depth.",
    default_parameter=Parameter(negative=()),
    version_flags=["--version"],
)

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
    chosen = _chosen(config, flags)
    from revtrain import commands  # noqa: PLC0415

    if dry_run:
        commands.plan(chosen)
    else:
        commands.train(chosen)


@app.command(name="evaluate")
def evaluate_command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    data: str | None = None,
    data_dir: Path | None = None,
    cpu: bool = False,
    mixed_precision: Precision | None = None,
) -> None:
    """Evaluate a finished run again: the same weights give the same accuracy.

    Args:
        run: The run folder.
        data: Another data set than the one that the run was trained on.
        data_dir: Folder of the data. Default: the one that the run was given.
        cpu: Evaluate on the CPU even where there is an accelerator.
        mixed_precision: Default: that of the run, but float32 on a CPU for a run on a GPU.
    """
    from revtrain import commands  # noqa: PLC0415

    commands.evaluate(run, data=data, data_dir=data_dir, cpu=cpu, mixed_precision=mixed_precision)


@app.command(name="list")
def list_command() -> None:
    """List the networks, the data sets and the recipes."""
    from revtrain.listing import print_lists  # noqa: PLC0415

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
    chosen = _chosen(config, flags)
    from revtrain import commands  # noqa: PLC0415

    commands.find_batch(chosen, largest=largest)


def _chosen(config: TrainConfig | None, flags: RecipeFlags | None) -> TrainConfig:
    """Joins the flags of both kinds; a bad value ends the program."""
    try:
        return replace(config or TrainConfig(), overrides=given(flags))
    except (ValueError, OSError) as error:
        end_with(error, 2)


def main() -> None:
    """Runs the command line; bad input ends it with one line on stderr and exit status 2."""
    try:
        command, arguments, _ = app.parse_args(sys.argv[1:], exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError, OSError) as error:
        end_with(error, 2)
    try:
        command(*arguments.args, **arguments.kwargs)
    except KeyboardInterrupt:  # before the first step, after the last, or the second
        resume = ": go on by the same command with --resume" if command is train_command else ""
        print(f"interrupted{resume}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
