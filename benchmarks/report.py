"""Writes the pictures and tables of the documents from the records in benchmarks/results.

Usage: `python benchmarks/report.py`; with `--check` it changes nothing, and fails if a table or a
picture is not that of the records.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import figures

from revtrain.memory import DepthCost, StepCost

# The better of two, in %: Gomez et al. (2017) and MemCNN (van de Leemput et al., 2019).
PUBLISHED = {
    ("cifar10", "resnet32"): (92.74, 92.86),
    ("cifar10", "resnet110"): (93.99, 93.55),
    ("cifar10", "resnet164"): (94.57, 94.80),
    ("cifar10", "revnet38"): (93.14, 92.80),
    ("cifar10", "revnet110"): (94.02, 94.10),
    ("cifar10", "revnet164"): (94.56, 94.90),
    ("cifar100", "resnet32"): (69.10, 69.81),
    ("cifar100", "resnet110"): (73.30, 72.40),
    ("cifar100", "resnet164"): (76.79, 76.47),
    ("cifar100", "revnet38"): (71.17, 69.90),
    ("cifar100", "revnet110"): (74.00, 73.30),
    ("cifar100", "revnet164"): (76.39, 76.90),
}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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
    if not check:
        figures.draw()
    stale += figures.stale()
    if check and stale:
        sys.exit(f"{', '.join(stale)} differ from the records: run python benchmarks/report.py")


def fill(text: str) -> str:
    """Replaces what stands between `<!-- table NAME -->` and `<!-- end -->`."""
    tables = {
        "caption": caption,
        "chaos": chaos,
        "alternatives": alternatives,
        "batches": batches,
        "cells": cells,
        "curves": curves,
        "depth": depth,
        "digits": digits,
        "kernels": kernels,
        "loaders": loaders,
        "overhead": overhead,
        "errors": errors,
        "gradients": gradients,
        "numerics": numerics_caption,
        "pitch": pitch,
        "published": published,
        "runs": runs,
        "single": lambda: runs(link=False),
        "twins": twins,
        "steps": steps,
        "ten_thousand": ten_thousand,
        "several": several_gpus,
    }

    def replacement(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, replacement, text, flags=re.DOTALL)


def runs(*, link: bool = True) -> str:
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
                (f"[{summary['model']}]({folder})" if link else summary["model"]) + changed,
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


def steps() -> str:
    """Returns what a training step costs, all ways."""
    parts = []
    for record in records("step-*.json"):
        rows = []
        stored = {
            (row["precision"], row["launch"]): row["step_ms"]
            for row in record["rows"]
            if row["way"] == "stored"
        }
        for row in record["rows"]:
            precision = "float32" if row["precision"] == "no" else row["precision"]
            if row["error"]:
                rows.append([row["way"], precision, row["launch"], row["error"], "", "", ""])
                continue
            base = stored.get((row["precision"], row["launch"]))
            rows.append(
                [
                    *(row["way"], precision, row["launch"], f"{row['step_ms']:.2f}"),
                    f"{row['step_ms'] / base:.2f}" if base else "",
                    *(megabytes(row["kept_bytes"]), megabytes(row["peak_bytes"])),
                ]
            )
        parts.append(
            f"{title(record)}, batch of {record['batch'][0]}, on {machine(record)}, by "
            f"`{record['command']}`:\n\n"
            + table("way, precision, launch, ms, of stored, kept MB, peak MB", rows)
        )
    return "\n\n".join(parts) or "No record yet."


def batches() -> str:
    """Returns memory and speed over the batch, and the largest batches in capped memory."""
    parts = []
    for record in records("batch-*.json"):
        rows = [
            [
                *(row["way"], f"{row['gigabytes']:g}" if "gigabytes" in row else ""),
                row.get("error") or f"{row['batch_size']:,}",
                *(megabytes(row.get("kept_bytes")), megabytes(row.get("peak_bytes"))),
                f"{row['images_per_second']:,.0f}" if "images_per_second" in row else "",
            ]
            for row in record["rows"]
        ]
        precision = "float32" if record["precision"] == "no" else record["precision"]
        parts.append(
            f"{title(record)}, {precision}, eager, on {machine(record)}, by "
            f"`{record['command']}`; lines with *GB* have the largest batch in so much memory:\n\n"
            + table("way, GB, batch, kept MB, peak MB, images per second", rows)
        )
    if parts:
        parts.append(picture("Memory over the batch", "batch-memory"))
    return "\n\n".join(parts) or "No record yet."


def ten_thousand() -> str:
    """Returns what nets of up to ten thousand layers cost, and what the deepest learned."""
    parts = []
    for record in records("ten-thousand-*.json"):
        training = record["training"]
        rows = [
            [
                *(f"{row['convolutions']:,}", "reversed" if row["reversing"] else "stored"),
                *(megabytes(row["kept_bytes"]), megabytes(row["peak_bytes"])),
                *("" if row["step_ms"] is None else f"{row['step_ms']:,.1f}", row["launch"]),
                f"{row['first_steps_seconds']:.1f}",
            ]
            for row in record["rows"]
        ]
        header = "layers, activations, kept MB, peak MB, ms, launch, first five steps s"
        losses, error = training["losses"], training["error"] or ""
        parts.append(
            f"{record['data']}, {record['scheme']}, batch of {record['batch'][0]}, on "
            f"{hardware(record)}, by `{record['command']}`. In {len(losses)} "
            f"steps ({training['seconds']:.0f} s) the deepest net's loss went from {losses[0]:.2f} "
            f"to {statistics.mean(losses[-10:]):.2f} (mean of the last ten)"
            f"{error and '; then: ' + error}:\n\n{table(header, rows)}"
        )
    if parts:
        parts.append(picture("Loss over steps", "ten-thousand"))
    return "\n\n".join(parts) or "No record yet."


def kernels() -> str:
    """Returns where the time of a step goes."""
    parts = []
    for record in records("kernels-*.json"):
        names = list(
            dict.fromkeys(kind for way in record["ways"].values() for kind in way["kinds"])
        )
        rows = [
            [kind]
            + [
                f"{way['kinds'][kind]['ms']:.2f} ({way['kinds'][kind]['launches']:.0f})"
                if kind in way["kinds"]
                else ""
                for way in record["ways"].values()
            ]
            for kind in names
        ]
        rows.append(["whole step"] + [f"{way['step_ms']:.2f}" for way in record["ways"].values()])
        parts.append(
            f"{title(record)}, milliseconds (launches) a step, on {machine(record)}, by "
            f"`{record['command']}`:\n\n" + table(f"kernels, {', '.join(record['ways'])}", rows)
        )
    return "\n\n".join(parts) or "No record yet."


def several_gpus() -> str:
    """Returns what several GPUs of one machine do: the same training, and how fast."""
    parts = []
    for record in records("several-gpus*.json"):
        count = record["hardware"]["processes"]
        parts.append(f"On {count} x {machine(record)}, by `{record['command']}`:")
        checks = [[text, "yes" if good else "no"] for text, good in several_checks(record)]
        parts.append(table("question, answer", checks))
        speed = record.get("speed", {})
        rows = []
        for row in speed.get("rows", []):
            name = [f"{row['model']}, {'reversed' if row['reversing'] else 'stored'}", row["way"]]
            if "error" in row:
                rows.append([*name, f"{row['processes']}", row["error"], "", "", ""])
                continue
            ranks = [row[key] for key in ("kept_bytes_of_ranks", "peak_bytes_of_ranks")]
            rows.append(
                [
                    *(*name, f"{row['processes']}", f"{row['images_per_second']:,.0f}"),
                    f"{row['step_ms']:.1f}",
                    *(megabytes(None if None in of else max(of)) for of in ranks),
                ]
            )
        if rows:
            parts.append(
                f"Steps of {speed['batch_size_of_a_process']} images a process. *Kept* is what "
                "stays between steps, *peak* the most in a step, both of the fullest rank:"
            )
            header = "network, shared by, processes, images per second, ms, kept MB, peak MB"
            parts.append(table(header, rows))
        ready = [row for row in speed.get("readiness", []) if "error" not in row]
        if ready:
            parts.append("When gradients are ready to be summed, from 0 to 1 of the backward pass:")
            rows = [
                [
                    f"{row['model']}, {'reversed' if row['reversing'] else 'stored'}",
                    f"{len(row['ready_at'])}",
                    *(f"{row['ready_at'][at]:.2f}" for at in (0, len(row["ready_at"]) // 2, -1)),
                ]
                for row in ready
            ]
            parts.append(table("network, buckets, first, middle, last", rows))
    return "\n\n".join(parts) or "No record yet."


def several_checks(record: dict[str, Any]) -> list[tuple[str, bool]]:
    checks = []
    curve, resume = record.get("curve", {}), record.get("resume", {})
    if "same_samples" in curve:
        gaps = curve["several_against_one"]
        first = gaps["first_steps_largest_relative_difference_of_loss"]
        twin = curve["one_stored_against_one"]["largest_relative_difference_of_loss"]
        losses = (
            f"The loss of one GPU: first steps within {first:.1g} of it; all "
            f"{len(curve['one']['step_losses'])} within "
            f"{gaps['largest_relative_difference_of_loss']:.1g} (one GPU, stored: {twin:.1g})"
        )
        checks = [
            ("The samples of one GPU in each step", curve["same_samples"]),
            ("The same weights on all ranks at the end", curve["ranks_have_the_same_weights"]),
            (losses, curve["good"]),
        ]
    if "compared" in resume:
        text = f"The same bits, one rank killed, resumed after step {resume['resumed_after_step']}"
        checks.append((text, resume["good"]))
    return checks


def cells() -> str:
    """Returns the cells of the results table: the mean over all seeds of a recipe."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    failures = len(list(RESULTS.glob("cells/*/failure-*.json")))
    for file in sorted(RESULTS.glob("cells/*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if "test_accuracy" not in summary:
            continue  # of the search for a recipe, on the validation images
        # What is trained in another way has a word of its own at the end of its name.
        label = file.parent.name.partition(f"seed{summary['seed']}")[2].lstrip("-")
        recipe = Path(summary["recipe"]).stem + (f" ({label})" if label else "")
        groups.setdefault((summary["data"], summary["model"], recipe), []).append(summary)
    rows = []
    for (data, model, recipe), runs in groups.items():
        accuracies = [100 * run["test_accuracy"] for run in runs]
        timed = [run["wall_seconds"] for run in runs if run["wall_seconds"] is not None]
        best = max(PUBLISHED.get((data, model), (0.0,)))
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        rows.append(
            [
                *(f"{data} {model}", recipe, f"{statistics.mean(accuracies):.2f}{spread}"),
                *(f"{len(runs)}", f"{best:.2f}" if best else ""),
                # Unknown of a run that was stopped and went on.
                f"{statistics.mean(timed):,.0f}" if timed else "",
                f"{max(run['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
            ]
        )
    if not rows:
        return "No record yet."
    header = "network, recipe, test accuracy %, runs, published %, seconds, peak MB"
    failed = f"\n\nRuns that failed: {failures}, their records are beside these."
    return table(header, rows) + (failed if failures else "")


def chaos() -> str:
    """Returns how many kills training survived."""
    record = read("chaos.json")

    def count(**wanted: Any) -> int:
        found = [hit for hit in record["hits"] if wanted.items() <= hit.items()]
        return sum(hit["kills"] for hit in found)

    kills = count()
    if record["lost"] or kills != record["kills"]:
        raise ValueError(f"{record['lost']} runs were lost, or kills were miscounted")
    names = {
        "start": "while it started",
        "training": "in training",
        "saving": "while it saved",
        "evaluation": "in evaluation",
        "finishing": "while it wrote its results",
    }
    places = ", ".join(f"{count(where=place)} {name}" for place, name in names.items())
    if sum(count(where=place) for place in names) != kills:
        raise ValueError(f"kills at other places than {', '.join(names)}")
    largest = record["checkpoints"][-1]
    return (
        f"In that record {kills} kills ({count(how='SIGKILL')} by SIGKILL, {count(how='SIGTERM')} "
        f"by SIGTERM; {count(processes=1)} of one process, {count(processes=2)} of two) hit "
        f"{record['runs']} runs: {places}. No run ended with other bits. All "
        f"{len(record['damages'])} kinds of damage that were tried were refused. A checkpoint of "
        f"{largest['model']} ({largest['parameters']:,} parameters, "
        f"{largest['checkpoint_bytes'] / 1e6:.1f} MB) took {largest['save_seconds']:.2f} s to save "
        f"and {largest['verify_and_load_seconds']:.2f} s to check and load, on {hardware(record)}."
    )


def published() -> str:
    """Returns the accuracies of the papers."""
    models = [model for data, model in PUBLISHED if data == "cifar10"]
    rows = [
        [model]
        + [f"{value:.2f}" for data in ("cifar10", "cifar100") for value in PUBLISHED[data, model]]
        for model in models
    ]
    header = "network, CIFAR-10: Gomez et al., MemCNN, CIFAR-100: Gomez et al., MemCNN"
    return table(header, rows)


def curves() -> str:
    """Returns the learning curves of the data sets that there are runs of."""
    return "\n\n".join(
        f"![Test accuracy over the epochs, {data}](assets/figures/curves-{data}-{theme}.svg"
        f"#only-{theme})"
        for data in ("cifar10", "cifar100")
        if figures.source(f"curves-{data}")
        for theme in figures.THEMES
    )


def twins() -> str:
    """Returns whether reversed and stored training end with the same bits."""
    record = read("twins-fixed-point-h100.json")
    steps = len(record["losses_reversed"])
    if record["first_difference"] is not None or record["largest_weight_difference"] != 0:
        raise ValueError("the twins differ")
    return (
        f"{title(record)} with the fixed-point scheme was trained twice for {steps:,} steps on "
        f"{record['data']}, once reversed and once stored. The losses of all steps are the same "
        f"bits, and so are all weights at the end ({machine(record)}, by `{record['command']}`)."
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


def loaders() -> str:
    """Returns how fast each loader is, alone and beside a training step."""
    parts = []
    for file in sorted(RESULTS.glob("loaders-*.json")):
        record = read(file.name)
        rows = [
            [
                row["loader"].replace(",", ""),
                f"{row['batch']}",
                f"{row['images_per_second']:,.0f}",
                f"{row['batch_ms']:.2f}",
                f"{row['step_ms_same_batch']:,.1f}",
                f"{row['step_ms_with_loader']:,.1f}",
            ]
            for row in record["loaders"]
        ]
        header = "loader, batch, images/s alone, ms a batch, ms a step with one batch, with loader"
        parts.append(
            f"{record['data']}, {record['model']}, on {hardware(record)}, by "
            f"`{record['command']}`:\n\n{table(header, rows)}"
        )
    return "\n\n".join(parts)


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


def alternatives() -> str:
    """Returns the costs of storing, checkpointing and reversing the same blocks."""
    record = read("alternatives-cpu.json")
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


def records(pattern: str) -> list[dict[str, Any]]:
    return [read(file.name) for file in sorted(RESULTS.glob(pattern))]


def title(record: dict[str, Any]) -> str:
    model: str = record["model"]["model"]
    return model.replace("revnet", "RevNet-").replace("resnet", "ResNet-")


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f}"


def machine(record: dict[str, Any]) -> str:
    return hardware({**record, "hardware": record["hardware"] | {"mixed_precision": "no"}})


def hardware(record: dict[str, Any]) -> str:
    machine = record["hardware"]
    device = machine.get("device_name") or f"{machine['cores']} CPU cores"
    precision = machine["mixed_precision"]
    suffix = "" if precision == "no" else f", {precision}"
    return f"{device}, torch {record['versions']['torch']}{suffix}"


def picture(title: str, name: str) -> str:
    return "\n".join(
        f"![{title}](assets/figures/{name}-{theme}.svg#only-{theme})" for theme in figures.THEMES
    )


def table(header: str, rows: list[list[str]]) -> str:
    names = header.split(", ")
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    main()
