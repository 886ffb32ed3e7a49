"""What the tables share: reading records, and how numbers are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figures

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def records(pattern: str) -> list[dict[str, Any]]:
    return [read(file.name) for file in sorted(RESULTS.glob(pattern))]


def read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


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
