"""Tables of training runs: accuracies, curves, twins."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import figures

from tables.records import (
    RESULTS,
    hardware,
    machine,
    picture,
    read,
    table,
    title,
)

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
# MemCNN's, at a batch of 100 on a GTX 1080, in what it calls MB: of its activations after the
# forward pass, and as the driver told it in training.
MEMCNN_MEMORY = {
    "resnet32": (238.6, 766),
    "resnet110": (810.7, 1357),
    "resnet164": (2452.8, 3083),
    "revnet38": (85.6, 677),
    "revnet110": (85.7, 706),
    "revnet164": (432.7, 1226),
}


def single() -> str:
    """Returns all runs: what was trained on what, and what came of it."""
    rows = []
    for file in sorted(RESULTS.glob("*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        config = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
        changed = "".join(
            f", {name} {' '.join(map(str, config['config'][name]))}"
            for name in ("blocks", "channels")
            if config["config"][name]
        )
        rows.append(
            [
                summary["model"] + changed,
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


def cells() -> str:
    """Returns the cells of the results table: the mean over all seeds of a recipe."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    first: dict[tuple[str, str], float] = {}
    failures = len(list(RESULTS.glob("cells/*/failure-*.json")))
    for file in sorted(RESULTS.glob("cells/*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if "test_accuracy" not in summary:
            continue  # of the search for a recipe, on the validation images
        # What is trained in another way has a word of its own at the end of its name.
        label = file.parent.name.partition(f"seed{summary['seed']}")[2].lstrip("-")
        recipe = Path(summary["recipe"]).stem + (f" ({label})" if label else "")
        config = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
        summary["device"] = _model(config["hardware"])
        cell = summary["data"], summary["model"]
        groups.setdefault((*cell, recipe), []).append(summary)
        if recipe == summary["data"] and summary["seed"] == 0 and summary["wall_seconds"]:
            first[cell] = summary["wall_seconds"]
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
                " and ".join(sorted({run["device"] for run in runs})),
            ]
        )
    if not rows:
        return "No record yet."
    header = "network, recipe, test accuracy %, runs, published %, seconds, peak MB, GPU"
    together = (
        f"\n\nThe {len(first)} networks with their data set's recipe and seed 0 took "
        f"{sum(first.values()) / 60:.1f} minutes together: the sum of their wall times, on the "
        "GPUs and at the commits of their records. Seconds in the table are means over the seeds."
    )
    failed = f"\n\nRuns that failed: {failures}, their records are beside these."
    return table(header, rows) + together + (failed if failures else "")


def twelve() -> str:
    """Returns the accuracy of each network with its data set's recipe, beside the published one."""
    found: dict[tuple[str, str], list[float]] = {}
    for file in sorted(RESULTS.glob("cells/*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if file.parent.name.endswith(f"-{summary['data']}-seed{summary['seed']}"):
            cell = summary["data"], summary["model"]
            found.setdefault(cell, []).append(100 * summary["test_accuracy"])
    rows = []
    for model in dict.fromkeys(model for _, model in PUBLISHED):
        row = [model]
        for data in ("cifar10", "cifar100"):
            accuracies = found[data, model]
            row += [f"{statistics.mean(accuracies):.2f} ({len(accuracies)})"]
            row += [f"{max(PUBLISHED[data, model]):.2f}"]
        rows.append(row)
    return table("network, CIFAR-10 % (runs), published, CIFAR-100 % (runs), published", rows)


def _model(machine: dict[str, Any]) -> str:
    name: str = machine.get("device_name", "CPU")
    return name.removeprefix("NVIDIA ").split()[0]


def study() -> str:
    """Returns the runs by which the recipes were chosen, on held-out training images."""
    rows = []
    for file in sorted(RESULTS.glob("cells/*-val/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        last = file.with_name("metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        rows.append(
            [
                *(f"{summary['data']} {summary['model']}", Path(summary["recipe"]).stem),
                *(f"{summary['epochs']}", f"{summary['val_accuracy'] * 100:.2f}"),
                f"{json.loads(last)['train_accuracy'] * 100:.1f}",
                # Unknown of a run that was stopped and went on.
                f"{summary['wall_seconds']:,.0f}" if summary["wall_seconds"] else "",
            ]
        )
    return table("network, recipe, epochs, val accuracy %, training accuracy %, seconds", rows)


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


def memory() -> str:
    """Returns the memory of each network in training, beside MemCNN's."""
    record = read("training-memory-h200.json")
    rows = []
    for row in record["rows"]:
        kept, driver = MEMCNN_MEMORY[row["net"]]
        rows.append(
            [
                *(row["net"], f"{row['kept_bytes'] / 2**20:,.1f}", f"{kept:,}"),
                f"{row['peak_bytes'] / 2**20:,.1f}",
                *(f"{row[f'driver_bytes_{way}'] / 2**20:,.0f}" for way in ("graph", "eager")),
                f"{driver:,}",
            ]
        )
    header = (
        "network, kept MiB, MemCNN's, peak MiB, driver MiB as a graph, driver MiB eager, MemCNN's"
    )
    text = (
        f"Batch of {record['batch_size']}, float32, on {machine(record)}, by `{record['command']}`:"
    )
    return f"{text}\n\n{table(header, rows)}"


def stored() -> str:
    """Returns how RevNet-38 did with the same seed, reversed and stored, and the curves."""
    parts = []
    for data in ("cifar10", "cifar100"):
        folders = [f"cells/{data}-revnet38-{data}-seed0{label}" for label in ("", "-stored")]
        pair = [read(f"{folder}/summary.json") for folder in folders]
        configs = [read(f"{folder}/config.json") for folder in folders]
        where = [f"{_model(one['hardware'])}, commit {one['commit'][:7]}" for one in configs]
        reversed_, kept = (100 * one["test_accuracy"] for one in pair)
        parts.append(
            f"{data}: {reversed_:.2f} % reversed ({where[0]}) and {kept:.2f} % stored "
            f"({where[1]}), {reversed_ - kept:+.2f} %; peak "
            f"{pair[0]['peak_memory_bytes'] / 1e6:,.0f} and "
            f"{pair[1]['peak_memory_bytes'] / 1e6:,.0f} MB.\n\n"
            + picture(f"Loss of the two runs, {data}", f"stored-{data}")
        )
    return "\n\n".join(parts)


def twins() -> str:
    """Returns whether reversed and stored training end with the same bits."""
    return "\n\n".join(
        _twins(read(f"twins-fixed-point-{name}.json")) for name in ("h200", "cifar100-h200")
    )


def _twins(record: dict[str, Any]) -> str:
    steps = len(record["losses_reversed"])
    if record["first_difference"] is not None or record["largest_weight_difference"] != 0:
        raise ValueError("the twins differ")
    return (
        f"{title(record)} with the fixed-point scheme was trained twice for {steps:,} steps on "
        f"{record['data']}, once reversed and once stored. The losses of all steps are the same "
        f"bits, and so are all weights at the end ({machine(record)}, by `{record['command']}`)."
    )
