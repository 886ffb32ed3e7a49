"""What a training run ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revtrain.config import TrainConfig
from revtrain.memory import DepthCost


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
