"""Tables of time: of a step, its kernels, its batch, its branches, its loader."""

from __future__ import annotations

import statistics

from tables.records import (
    RESULTS,
    hardware,
    machine,
    megabytes,
    picture,
    read,
    records,
    table,
    title,
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


def ratios() -> str:
    """Returns how the steps of RevNet-164 compare, in one configuration for each precision."""
    record = read("step-revnet164-100-h200.json")
    rows = {(row["way"], row["precision"], row["launch"]): row for row in record["rows"]}

    def ratio(one: str, other: str, precision: str, launches: str, of: str = "step_ms") -> str:
        first, second = launches.split("/")
        found = rows[one, precision, first][of] / rows[other, precision, second][of]
        return f"{found:.2f}"

    def compare(name: str, one: str, other: str, launches: str, of: str = "step_ms") -> list[str]:
        found = [name]
        for precision, ours in {"no": "revcore, recomputed", "bf16": "revcore"}.items():
            pair = [way.replace("ours", ours) for way in (one, other)]
            found.append(ratio(*pair, precision, launches, of))
        return found

    lines = [
        compare("reversed / stored, as a graph", "ours", "stored", "graph/graph"),
        compare("... without overlap", "ours, no overlap", "stored", "graph/graph"),
        compare("... launched from Python", "ours", "stored", "eager/eager"),
        compare("fixed point / additive", "revcore, fixed point", "revcore", "graph/graph"),
        compare("MemCNN as a graph / ours", "MemCNN", "ours", "graph/graph"),
        compare("MemCNN as published, eager / ours as a graph", "MemCNN", "ours", "eager/graph"),
        compare("kept / MemCNN's", "ours", "MemCNN", "graph/graph", "kept_bytes"),
        compare("peak / MemCNN's", "ours", "MemCNN", "graph/graph", "peak_bytes"),
    ]
    return (
        f"{title(record)}, batch of {record['batch'][0]}, on {machine(record)}; *ours* is "
        "*revcore, recomputed* in float32 and *revcore* in bf16, and all blocks are reversed:\n\n"
        + table("time or memory, float32, bf16", lines)
    )


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
        ways = ", ".join(way.replace(",", "") for way in record["ways"])
        parts.append(
            f"{title(record)}, milliseconds (launches) a step, on {hardware(record)}, by "
            f"`{record['command']}`:\n\n" + table(f"kernels, {ways}", rows)
        )
    return "\n\n".join(parts) or "No record yet."


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
