"""What a run leaves behind at its end: weights, pictures, memory over depth, summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from revmodels import RevNet
from revtrain.files import write_json
from revtrain.memory import DEPTHS, DepthCost, compare_memory, memory_json
from revtrain.net import NetSpec
from revtrain.plots import plot_curve, plot_memory
from revtrain.run_folder import RunFolder


def write_results(
    folder: RunFolder,
    model: nn.Module,
    spec: NetSpec,
    accelerator: Accelerator,
    *,
    records: Sequence[dict[str, Any]],
    split: str,
    summary: dict[str, Any],
    batch: tuple[Tensor, Tensor] | None,
) -> list[DepthCost]:
    """Writes the files of a finished run; one process calls this.

    Args:
        folder: The run folder.
        model: The trained network, without its wrapper.
        spec: What it is built from.
        accelerator: Gives device and precision.
        records: Those of all epochs.
        split: What was evaluated, `test` or `val`.
        summary: What `summary.json` will hold.
        batch: Images and labels to measure memory over depth with; None for no measurement.

    Returns:
        Memory and time over depth, if measured.
    """
    folder.write_weights(model.state_dict(), spec)
    plot_curve(records, split, folder.plots("curve"))
    costs: list[DepthCost] = []
    if batch is not None:
        recompute = isinstance(model, RevNet) and model.recompute
        costs = _compare_memory(folder, spec, accelerator, *batch, recompute=recompute)
    folder.write_summary(summary)  # the last: it says that the run is complete
    return costs


def _compare_memory(
    folder: RunFolder,
    spec: NetSpec,
    accelerator: Accelerator,
    x: Tensor,
    labels: Tensor,
    *,
    recompute: bool,
) -> list[DepthCost]:
    depths: tuple[int, ...] = DEPTHS
    if len(set(spec.blocks)) == 1:
        depths = tuple(sorted({*DEPTHS, spec.blocks[0]}))
    with Console(stderr=True).status("measuring activation memory over depth"):
        costs = compare_memory(spec, x, labels, accelerator, depths, recompute=recompute)
    write_json(folder.memory, memory_json(spec, x, costs, recompute=recompute))
    plot_memory(costs, spec.model, folder.plots("memory"))
    return costs
