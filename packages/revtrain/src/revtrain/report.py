"""What a run ends with, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from revtrain.memory import DepthCost
from revtrain.result import Result


def print_result(result: Result) -> None:
    """Prints accuracy, time, memory and where the files are, on stdout."""
    summary = result.summary
    parts: list[RenderableType] = []
    if result.memory:
        parts += [_memory_table(result.memory), Text(_in_words(result.memory)), Text("")]
    split = "val" if "val_accuracy" in summary else "test"
    parts.append(
        Text(
            f"{split} accuracy {summary[f'{split}_accuracy']:.2%}, "
            f"time per step {_milliseconds(summary['step_seconds'])} "
            f"({summary['images_per_second']:,.0f} images/s), "
            f"{summary['parameters']:,} parameters, {summary['steps']:,} steps in "
            f"{summary['train_seconds']:.0f} s",
            style="bold",
        )
    )
    parts.append(Text(f"run folder: {result.run_folder}"))
    Console(soft_wrap=True, highlight=False).print(Group(*parts))


def _memory_table(costs: Sequence[DepthCost]) -> Table:
    table = Table(
        title="One training step, activations reconstructed (rec.) or stored: MB and ms",
        title_justify="left",
        box=SIMPLE,
    )
    for name in ("blocks", "layers"):
        table.add_column(name, justify="right")
    # What the forward pass leaves behind, the peak of the step, its time.
    for name in ("kept", "peak", "time"):
        table.add_column(f"{name}\nrec.", justify="right", style="cyan")
        table.add_column(f"{name}\nstored", justify="right")
    for cost in costs:
        ours, plain = cost.reversing, cost.stored
        table.add_row(
            str(cost.blocks),
            str(cost.layers),
            f"{ours.activation_bytes / 1e6:.1f}",
            f"{plain.activation_bytes / 1e6:.1f}",
            f"{ours.peak_bytes / 1e6:.1f}",
            f"{plain.peak_bytes / 1e6:.1f}",
            f"{ours.step_seconds * 1e3:.1f}",
            f"{plain.step_seconds * 1e3:.1f}",
        )
    return table


def _in_words(costs: Sequence[DepthCost]) -> str:
    first, last = costs[0], costs[-1]
    growth = {
        mode: getattr(last, mode).activation_bytes / getattr(first, mode).activation_bytes
        for mode in ("reversing", "stored")
    }
    return (
        f"From {first.layers} to {last.layers} layers, reconstructed activations grow "
        f"{growth['reversing']:.2f} times, stored ones {growth['stored']:.2f} times; a step of the "
        f"deepest takes {last.reversing.step_seconds / last.stored.step_seconds:.2f} times as long."
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
