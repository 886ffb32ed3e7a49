"""What a training run ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revtrain.config import TrainConfig
from revtrain.memory import DepthCost
from revtrain.meter import Averages


@dataclass(frozen=True)
class Result:
    """What a training run ends with.

    Attributes:
        run_folder: Where its files are.
        summary: What `summary.json` holds: accuracy, loss, time and memory.
        metrics: One record for each epoch, as `metrics.jsonl` holds them.
        memory: Memory and time over depth, reversing and stored; empty if not asked for.
    """

    run_folder: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    memory: list[DepthCost]


def epoch_record(
    epoch: int,
    step: int,
    *,
    split: str,
    trained: Averages,
    tested: Averages,
    lr: float,
    steps: int,
    seconds: float,
    peak_memory_bytes: int | None,
) -> dict[str, Any]:
    """Returns a line of `metrics.jsonl`.

    Args:
        epoch: Its number, counted from 1.
        step: Steps of the run so far.
        split: What was evaluated, `test` or `val`.
        trained: Averages over the training images.
        tested: Averages over the others.
        lr: Learning rate of the last step.
        steps: Steps of the epoch.
        seconds: What they took.
        peak_memory_bytes: The most memory so far, where something counts it.
    """
    return {
        "epoch": epoch,
        "step": step,
        "train_loss": trained.loss,
        "train_accuracy": trained.accuracy,
        f"{split}_loss": tested.loss,
        f"{split}_accuracy": tested.accuracy,
        "lr": lr,
        "seconds": seconds,
        "step_seconds": seconds / steps,
        "images_per_second": trained.images / seconds,
        "peak_memory_bytes": peak_memory_bytes,
    }


def summarize(
    config: TrainConfig,
    metrics: list[dict[str, Any]],
    *,
    batch_size: int,
    parameters: int,
    seconds: float,
) -> dict[str, Any]:
    """Returns what `summary.json` holds.

    Args:
        config: What was trained.
        metrics: The records of all epochs.
        batch_size: Images per step.
        parameters: Of the network.
        seconds: From the start to now.
    """
    last = metrics[-1]
    # The first epoch pays for starting up; the median of the others is what a step takes.
    usual = sorted(record["step_seconds"] for record in metrics[1:] or metrics)
    step_seconds = usual[len(usual) // 2]
    peaks = [record["peak_memory_bytes"] for record in metrics]
    return {
        "data": config.data,
        "model": config.model,
        "recipe": config.recipe,
        "seed": config.seed,
        **{key: value for key, value in last.items() if key.endswith(("_loss", "_accuracy"))},
        "parameters": parameters,
        "epochs": last["epoch"],
        "steps": last["step"],
        "step_seconds": step_seconds,
        "images_per_second": batch_size / step_seconds,
        "peak_memory_bytes": max(peaks) if None not in peaks else None,
        "train_seconds": sum(record["seconds"] for record in metrics),
        "seconds": seconds,
    }
