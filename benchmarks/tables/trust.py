"""Tables of training under faults and on several GPUs."""

from __future__ import annotations

from typing import Any

from tables.records import hardware, machine, megabytes, read, records, table


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
