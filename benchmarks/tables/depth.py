"""Tables of memory over depth, and of errors over depth."""

from __future__ import annotations

from typing import Any

from revtrain.memory import DepthCost, StepCost
from tables.records import hardware, read, table


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


def pitch() -> str:
    """Returns the same in one sentence."""
    record = read("depth.json")
    first, last = costs(record)[0], costs(record)[-1]
    stored, reversed_ = (
        [getattr(cost, way).activation_bytes / 1e6 for cost in (first, last)]
        for way in ("stored", "reversing")
    )
    if round(reversed_[0], 1) != round(reversed_[1], 1):
        raise ValueError(f"what is kept is not flat: {reversed_}")
    return (
        f"From {first.layers} to {last.layers} layers, what a training step keeps grows from "
        f"{stored[0]:,.0f} to {stored[1]:,.0f} MB when it is stored, and stays at "
        f"{reversed_[0]:,.1f} MB when it is reversed: {record['model']} with more and more blocks, "
        f"a batch of {record['batch'][0]} images, {hardware(record)}."
    )


def depth() -> str:
    """Returns memory and time over depth on a GPU."""
    record = read("depth.json")
    return f"{record['model']} on {hardware(record)}, eager:\n\n{cost_table(record)}"


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


def errors() -> str:
    """Returns the errors of reconstruction, by scheme and depth."""
    found = read("numerics.json")["rows"]
    depths = sorted({row["depth"] for row in found})
    rows = []
    for way in dict.fromkeys(row["way"] for row in found):
        by_depth = {row["depth"]: row["stream"] for row in found if row["way"] == way}
        rows.append([way.replace(",", ";"), *(scientific(by_depth[depth]) for depth in depths)])
    return table(", ".join(["scheme; streams; branches", *map(str, depths)]), rows)


def gradients() -> str:
    """Returns the errors of gradients, reversed and stored, at one depth."""
    found = [row for row in read("numerics.json")["rows"] if row["depth"] == 64]
    rows = [
        [
            row["way"].replace(",", ";"),
            *(scientific(row[f"gradient_{way}"]) for way in ("stored", "reversed")),
        ]
        for row in found
    ]
    return table("scheme; streams; branches, stored, reversed", rows)


def numerics_caption() -> str:
    """Returns how the errors were measured."""
    record = read("numerics.json")
    batch = "x".join(map(str, record["batch"]))
    return (
        f"Measured with a batch of {batch}, branches of two 3x3 convolutions with BatchNorm and "
        f"ReLU, fresh weights, the median of {record['seeds']} seeds; anchors at every "
        f"{record['anchor_every']}th block; on {hardware(record)}, by `{record['command']}`."
    )


def scientific(error: float | None) -> str:
    # Above one nothing is right, and how wrong it is does not matter.
    if error is None or error > 1:
        return "> 1"
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-").replace("e+00", "")
