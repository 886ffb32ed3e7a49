"""The pictures of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from revtrain.files import whole_file
from revtrain.memory import DepthCost

# Told apart by the color-blind as well (Okabe and Ito 2008), and by their marks.
_BLUE, _ORANGE, _GRAY = "#0072b2", "#d55e00", "#666666"


def plot_curve(metrics: Sequence[dict[str, Any]], split: str, paths: Sequence[Path]) -> None:
    """Draws loss and accuracy over the epochs.

    Args:
        metrics: One record for each epoch, as in `metrics.jsonl`.
        split: The split that was evaluated, `test` or `val`.
        paths: Where to write; the suffix says in which format.
    """
    figure, (left, right) = _figure("Learning curve", width=9)
    epochs = [record["epoch"] for record in metrics]
    for key, axes, scale, label in (
        ("loss", left, 1, "loss"),
        ("accuracy", right, 100, "accuracy, %"),
    ):
        for part, color, mark in (("train", _ORANGE, "s"), (split, _BLUE, "o")):
            values = [scale * record[f"{part}_{key}"] for record in metrics]
            mark_each = mark if len(metrics) < 30 else ""
            axes.plot(epochs, values, color=color, marker=mark_each, markersize=4, label=part)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    last = 100 * metrics[-1][f"{split}_accuracy"]
    right.set_title(f"{split} accuracy {last:.2f} %", fontsize=10, color=_GRAY)
    _save(figure, paths)


def plot_memory(costs: Sequence[DepthCost], model: str, paths: Sequence[Path]) -> None:
    """Draws activation memory and time of a step over depth, reversing and stored.

    Args:
        costs: What `revtrain.compare_memory` returned.
        model: Name of the network, for the title.
        paths: Where to write; the suffix says in which format.
    """
    figure, (left, right) = _figure(f"One training step of {model}, made deeper", width=9)
    layers = [cost.layers for cost in costs]
    for mode, color, mark in (("stored", _ORANGE, "s"), ("reversing", _BLUE, "o")):
        steps = [getattr(cost, mode) for cost in costs]
        label = "activations stored" if mode == "stored" else "activations reconstructed"
        for axes, values in (
            (left, [step.activation_bytes / 1e6 for step in steps]),
            (right, [step.step_seconds * 1e3 for step in steps]),
        ):
            axes.plot(layers, values, color=color, marker=mark, markersize=5, label=label)
    left.set_ylabel("memory of activations, MB")
    right.set_ylabel("time of a step, ms")
    for axes in (left, right):
        axes.set_xlabel("layers")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    _save(figure, paths)


def _figure(title: str, *, width: float) -> tuple[Figure, tuple[Axes, Axes]]:
    """Makes two axes side by side, without touching pyplot's global state."""
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, (left, right)


def _save(figure: Figure, paths: Sequence[Path]) -> None:
    for path in paths:
        # The same picture, the same bytes: neither a date nor names drawn at random.
        undated = {"Date": None} if path.suffix == ".svg" else None
        with whole_file(path) as temporary, rc_context({"svg.hashsalt": "revtrain"}):
            figure.savefig(temporary, dpi=150, metadata=undated)
