"""Draws the pictures of the documents from the records in benchmarks/results.

Each is drawn twice, for light and dark pages, and names in its description the records that it was
drawn from with their checksums, by which `python benchmarks/report.py --check` sees whether it is
that of the records.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = ROOT / "docs" / "assets" / "figures"

# Told apart by the color-blind as well (Okabe and Ito 2008), brighter on dark pages.
THEMES = {
    "light": {"ink": "#333333", "grid": "#e4e4e4", "colors": ["#0072b2", "#d55e00", "#00805f"]},
    "dark": {"ink": "#d5d8e0", "grid": "#3b3e4a", "colors": ["#56b4e9", "#f0883e", "#3fc59d"]},
}
# Text stays text, and the same record gives the same bytes.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rev",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "legend.frameon": False,
}


def memory(axes: Axes, colors: list[str]) -> None:
    """Draws the memory of a step over depth."""
    _over_depth(axes, colors, lambda cost: cost["activation_bytes"] / 1e6)
    axes.set_ylabel("MB kept for the backward pass")


def time(axes: Axes, colors: list[str]) -> None:
    """Draws the time of a step over depth."""
    _over_depth(axes, colors, lambda cost: cost["step_seconds"] * 1e3)
    axes.set_ylabel("ms a step, launched from Python")


def _over_depth(axes: Axes, colors: list[str], value: Callable[[dict[str, Any]], float]) -> None:
    depths = _read("depth.json")["depths"]
    for way, label, color, mark in (
        ("stored", "activations stored", colors[1], "s"),
        ("reversing", "reversed", colors[0], "o"),
    ):
        layers = [cost["layers"] for cost in depths]
        axes.plot(layers, [value(cost[way]) for cost in depths], mark + "-", c=color, label=label)
    axes.set_xlabel("layers")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.legend()


def numerics(axes: Axes, colors: list[str]) -> None:
    """Draws the error of reconstructed activations over depth."""
    found = _read("numerics.json")["rows"]
    blue, orange, green = colors
    for way, color, style in (
        ("affine, bf16", orange, "v--"),
        ("additive, bf16", blue, "o--"),
        ("additive, float32, bf16 branches", blue, "o-."),
        ("affine, float32", orange, "v-"),
        ("additive, float32", blue, "o-"),
    ):
        points = [(row["depth"], row["stream"]) for row in found if row["way"] == way]
        axes.plot(*zip(*points, strict=True), style, c=color, label=way)
    axes.set(xscale="log", yscale="log", xlabel="blocks", ylabel="relative error")
    axes.set_ylim(1e-7, 3)  # above one nothing is right
    exact = [row["stream"] for row in found if row["way"].startswith("fixed point")]
    if any(exact):
        raise ValueError(f"the fixed-point scheme has errors: {exact}")
    axes.plot([], [], c=green, label="fixed point: none at any depth")
    depths = sorted({row["depth"] for row in found})
    axes.set_xticks(depths, [f"{depth}" for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def curves(data: str) -> Callable[[Axes, list[str]], None]:
    """Returns what draws test accuracy over the epochs, of seed 0 with the data set's recipe."""

    def draw_curves(axes: Axes, colors: list[str]) -> None:
        for number, file in enumerate(sorted(RESULTS.glob(f"cells/{_curves(data)}"))):
            summary = json.loads(file.with_name("summary.json").read_text(encoding="utf-8"))
            lines = file.read_text(encoding="utf-8").splitlines()
            points = [json.loads(line) for line in lines]
            axes.plot(
                [point["epoch"] for point in points],
                [100 * point["test_accuracy"] for point in points],
                ("-", "--", ":", "-.")[number // len(colors) % 4],
                c=colors[number % len(colors)],
                label=f"{summary['model']}, {100 * summary['test_accuracy']:.2f} %",
            )
        axes.set(xlabel="epoch", ylabel=f"{data}: test accuracy, %")
        axes.legend(loc="lower right", fontsize=9)

    return draw_curves


def _curves(data: str) -> str:
    return f"{data}-*-{data}-seed0/metrics.jsonl"


def stored(data: str) -> Callable[[Axes, list[str]], None]:
    """Returns what draws the loss of RevNet-38, reversed and stored, with the same seed."""

    def draw_stored(axes: Axes, colors: list[str]) -> None:
        folder = RESULTS / "cells" / f"{data}-revnet38-{data}-seed0"
        for number, (name, path) in enumerate(
            (("reversed", folder), ("stored", folder.with_name(folder.name + "-stored")))
        ):
            lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            points = [json.loads(line) for line in lines]
            for key, style in (("train_loss", "-"), ("test_loss", ":")):
                axes.plot(
                    [point["epoch"] for point in points],
                    [point[key] for point in points],
                    style,
                    c=colors[number],
                    label=f"{name}, {key.partition('_')[0]}",
                )
        axes.set(xlabel="epoch", ylabel=f"{data}: loss of revnet38")
        axes.legend(fontsize=9)

    return draw_stored


def steps(key: str, scale: float, label: str) -> Callable[[Axes, list[str]], None]:
    """Returns what draws one number of a training step, all ways, as CUDA graphs."""

    def draw_steps(axes: Axes, colors: list[str]) -> None:
        record = _read(max(RESULTS.glob(STEPS)).name)
        rows = [row for row in record["rows"] if row["launch"] == "graph" and not row["error"]]
        ways = list(dict.fromkeys(row["way"] for row in rows))
        for number, (precision, name) in enumerate((("no", "float32"), ("bf16", "bf16"))):
            values = {r["way"]: r[key] * scale for r in rows if r["precision"] == precision}
            places = [ways.index(way) + 0.38 * (number - 0.5) for way in values]
            bars = axes.barh(places, list(values.values()), 0.36, color=colors[number], label=name)
            axes.bar_label(bars, fmt="{:,.1f}", padding=3, fontsize=9)
        axes.set_yticks(range(len(ways)), ways)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlabel(label)
        # Above, where no bar is.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return draw_steps


def learning(axes: Axes, colors: list[str]) -> None:
    """Draws the loss of the deepest net over its steps, and the mean of the last ten."""
    record = _read(max(RESULTS.glob(TEN_THOUSAND)).name)
    losses = record["training"]["losses"]
    means = [statistics.mean(losses[max(0, end - 10) : end]) for end in range(1, len(losses) + 1)]
    steps_ = range(1, len(losses) + 1)
    layers = record["rows"][-1]["convolutions"]
    axes.plot(steps_, losses, c=colors[0], alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps_, means, c=colors[0], label="mean of ten")
    axes.set(xlabel="step", ylabel=f"{record['data']}: loss of {layers:,} layers")
    axes.legend()


def batch_memory(axes: Axes, colors: list[str]) -> None:
    """Draws the peak memory of a step over the batch, all ways."""
    rows = [r for r in _read(max(RESULTS.glob(BATCHES)).name)["rows"] if r.get("peak_bytes")]
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        points = [(r["batch_size"], r["peak_bytes"] / 1e9) for r in rows if r["way"] == way]
        style = ("o-", "s--", "v:")[number // len(colors) % 3]
        axes.plot(*zip(*points, strict=True), style, c=colors[number % len(colors)], label=way)
    axes.set(xlabel="batch", ylabel="GB at the peak of a step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


BATCHES = "batch-revnet164-*.json"
TEN_THOUSAND = "ten-thousand-*.json"
STEPS = "step-revnet164-100-*.json"
# What is drawn, from which records, and its size in inches.
FIGURES: dict[str, tuple[Callable[[Axes, list[str]], None], str, tuple[float, float]]] = {
    "memory": (memory, "depth.json", (6.4, 3.2)),
    "time": (time, "depth.json", (6.4, 3.2)),
    "numerics": (numerics, "numerics.json", (7.6, 3.4)),
    "curves-cifar10": (curves("cifar10"), f"cells/{_curves('cifar10')}", (6.4, 3.2)),
    "curves-cifar100": (curves("cifar100"), f"cells/{_curves('cifar100')}", (6.4, 3.2)),
    "stored-cifar10": (
        stored("cifar10"),
        "cells/cifar10-revnet38-cifar10-seed0*/metrics.jsonl",
        (6.4, 3.2),
    ),
    "stored-cifar100": (
        stored("cifar100"),
        "cells/cifar100-revnet38-cifar100-seed0*/metrics.jsonl",
        (6.4, 3.2),
    ),
    "step-time": (steps("step_ms", 1, "ms a step"), STEPS, (6.4, 5.6)),
    "step-memory": (steps("kept_bytes", 1e-6, "MB kept for the backward pass"), STEPS, (6.4, 5.6)),
    "batch-memory": (batch_memory, BATCHES, (7.6, 3.4)),
    "ten-thousand": (learning, TEN_THOUSAND, (6.4, 3.2)),
}


def draw() -> None:
    """Draws all figures that there are records for."""
    FOLDER.mkdir(exist_ok=True)
    for name, (function, _, size) in FIGURES.items():
        if not source(name):
            continue
        for theme, look in THEMES.items():
            ink = {"axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"}
            with mpl.rc_context(STYLE | dict.fromkeys(ink, look["ink"])):
                figure = Figure(figsize=size, layout="constrained")
                FigureCanvasAgg(figure)
                axes = figure.subplots()
                axes.grid(color=look["grid"], linewidth=0.8)
                function(axes, list(look["colors"]))
                metadata = {"Date": None, "Description": source(name)}
                path = FOLDER / f"{name}-{theme}.svg"
                figure.savefig(path, transparent=True, metadata=metadata)
                # Without the blanks that matplotlib leaves at the ends of lines.
                lines = path.read_text(encoding="utf-8").splitlines()
                text = "\n".join(line.rstrip() for line in lines) + "\n"
                path.write_text(text, encoding="utf-8")


def source(name: str) -> str:
    """Returns the records of a figure with their checksums."""
    files = sorted(RESULTS.glob(FIGURES[name][1]))
    sums = (hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)
    names = (file.relative_to(ROOT).as_posix() for file in files)
    return ", ".join(f"{file} sha256 {sum_}" for file, sum_ in zip(names, sums, strict=True))


def stale() -> list[str]:
    """Lists the figures that are missing, or not those of the records."""
    drawn = filter(source, FIGURES)
    paths = [(FOLDER / f"{name}-{theme}.svg", name) for name in drawn for theme in THEMES]
    return [
        path.name
        for path, name in paths
        if not path.is_file() or source(name) not in path.read_text(encoding="utf-8")
    ]


def _read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record
