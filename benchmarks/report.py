"""Writes the pictures and tables of the documents from the records in benchmarks/results.

Usage: `python benchmarks/report.py`; with `--check` it changes nothing, and fails if a table or a
picture is not that of the records.
"""

from __future__ import annotations

import argparse
import re
import sys

import figures
from tables import depth, runs, speed, trust
from tables.records import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += [ROOT / "benchmarks" / "RECIPES.md"]


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
        "caption": depth.caption,
        "chaos": trust.chaos,
        "alternatives": speed.alternatives,
        "batches": speed.batches,
        "cells": runs.cells,
        "curves": runs.curves,
        "depth": depth.depth,
        "digits": depth.digits,
        "kernels": speed.kernels,
        "loaders": speed.loaders,
        "memory": runs.memory,
        "overhead": speed.overhead,
        "errors": depth.errors,
        "gradients": depth.gradients,
        "numerics": depth.numerics_caption,
        "pitch": depth.pitch,
        "published": runs.published,
        "ratios": speed.ratios,
        "single": runs.single,
        "study": runs.study,
        "twelve": runs.twelve,
        "twins": runs.twins,
        "steps": speed.steps,
        "stored": runs.stored,
        "ten_thousand": speed.ten_thousand,
        "several": trust.several_gpus,
    }

    def replacement(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, replacement, text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
