"""Writes the pictures and tables of the documents from the records in benchmarks/results.

Usage: `python benchmarks/report.py`; with `--check` it changes nothing, and fails if a table is not
that of the records.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from revtrain.memory import DepthCost, StepCost
from revtrain.plots import plot_memory

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "when-not.md"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for document in DOCUMENTS:
        old = document.read_text(encoding="utf-8")
        new = fill(old)
        if new == old:
            continue
        stale.append(document.name)
        if not check:
            document.write_text(new, encoding="utf-8")
    if check and stale:
        sys.exit(f"{', '.join(stale)} differ from the records: run python benchmarks/report.py")
    if not check:
        record = read("depth.json")
        plot_memory(costs(record), record["model"], [ROOT / "docs" / "assets" / "memory.svg"])


def fill(text: str) -> str:
    """Replaces what stands between `<!-- table NAME -->` and `<!-- end -->`."""
    tables = {
        "caption": caption,
        "depth": depth,
        "digits": digits,
        "overhead": overhead,
        "runs": runs,
        "ways": ways,
    }

    def replacement(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, replacement, text, flags=re.DOTALL)


def runs() -> str:
    """Returns all runs: what was trained on what, and what came of it."""
    rows = []
    for file in sorted(RESULTS.glob("*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        config = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
        folder = file.parent.relative_to(ROOT).as_posix()
        changed = "".join(
            f", {name} {' '.join(map(str, config['config'][name]))}"
            for name in ("blocks", "channels")
            if config["config"][name]
        )
        rows.append(
            [
                f"[{summary['model']}]({folder}){changed}",
                f"{summary['parameters']:,}",
                summary["data"],
                f"{summary['test_accuracy'] * 100:.2f} %",
                f"{summary['epochs']}",
                f"{summary['train_seconds']:,.0f} s",
                f"{summary['step_seconds'] * 1e3:.1f} ms",
                f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB",
                hardware(config),
            ]
        )
    return table(
        "network, parameters, data, test accuracy, epochs, training time, step,"
        " peak memory, hardware",
        rows,
    )


def digits() -> str:
    """Returns what the main job ends with."""
    folder = "revnet38-digits-cpu"
    summary, config = read(f"{folder}/summary.json"), read(f"{folder}/config.json")
    record = read(f"{folder}/memory.json")
    accuracy, step = summary["test_accuracy"] * 100, summary["step_seconds"] * 1e3
    return (
        f"On {hardware(config)}, it reached {accuracy:.1f} % on the test images in "
        f"{summary['train_seconds']:.0f} s, at {step:.0f} ms a step, and measured (batch of "
        f"{record['batch'][0]}; *kept* is what the forward pass leaves behind for the backward "
        f"pass):\n\n{cost_table(record)}"
    )


def caption() -> str:
    """Returns how the numbers of the picture came about."""
    record = read("depth.json")
    batch = "x".join(map(str, record["batch"]))
    first, last = costs(record)[0], costs(record)[-1]
    return (
        f"Measured with {record['model']} and other numbers of blocks, a batch of {batch}, float32 "
        f"streams, on {hardware(record)}, eager, by `{record['command']}`. From {first.layers} to "
        f"{last.layers} layers, what a step keeps goes from "
        f"{first.stored.activation_bytes / 1e6:,.0f} to {last.stored.activation_bytes / 1e6:,.0f} "
        f"MB stored, and from {first.reversing.activation_bytes / 1e6:,.1f} to "
        f"{last.reversing.activation_bytes / 1e6:,.1f} MB reversed."
    )


def depth() -> str:
    """Returns memory and time over depth on a GPU."""
    record = read("depth.json")
    return f"{record['model']} on {hardware(record)}, eager:\n\n{cost_table(record)}"


def overhead() -> str:
    """Returns what a branch costs that computes next to nothing."""
    parts = []
    for name in ("overhead-cpu.json", "overhead-cuda.json"):
        record = read(name)
        rows = [
            [branch, *(f"{value:.0f}" for value in times.values())]
            for branch, times in record["microseconds"].items()
        ]
        ways_ = ", ".join(next(iter(record["microseconds"].values())))
        parts.append(f"{hardware(record)}:\n\n{table(f'branch, {ways_}', rows)}")
    return "\n\n".join(parts)


def ways() -> str:
    """Returns the costs of storing, checkpointing and reversing the same blocks."""
    record = read("ways-cpu.json")
    stored = record["ways"]["stored"]["step_seconds"]
    rows = [
        [
            way.replace(",", ":"),
            f"{cost['activation_bytes'] / 1e6:,.1f}",
            f"{cost['peak_bytes'] / 1e6:,.1f}",
            f"{cost['step_seconds'] / stored:.2f}",
        ]
        for way, cost in record["ways"].items()
    ]
    batch = "x".join(map(str, record["batch"]))
    return (
        f"{record['blocks']} blocks, a batch of {batch}, on {hardware(record)}, by "
        f"`{record['command']}`:\n\n"
        + table("way, kept MB, peak MB, time of a step / that of storing", rows)
    )


def cost_table(record: dict[str, Any]) -> str:
    rows = []
    for cost in costs(record):
        row = [f"{cost.layers}"]
        for key, scale in (("activation_bytes", 1e-6), ("peak_bytes", 1e-6), ("step_seconds", 1e3)):
            row += [f"{getattr(way, key) * scale:,.1f}" for way in (cost.reversing, cost.stored)]
        rows.append(row)
    return table(
        "layers, kept MB reversed, kept MB stored, peak MB reversed, peak MB stored,"
        " step ms reversed, step ms stored",
        rows,
    )


def costs(record: dict[str, Any]) -> list[DepthCost]:
    return [
        DepthCost(**(cost | {way: StepCost(**cost[way]) for way in ("reversing", "stored")}))
        for cost in record["depths"]
    ]


def hardware(record: dict[str, Any]) -> str:
    machine = record["hardware"]
    device = machine.get("device_name") or f"{machine['cores']} CPU cores"
    precision = machine["mixed_precision"]
    suffix = "" if precision == "no" else f", {precision}"
    return f"{device}, torch {record['versions']['torch']}{suffix}"


def table(header: str, rows: list[list[str]]) -> str:
    names = header.split(", ")
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    main()
