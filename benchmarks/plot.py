"""Makes the pictures of README and docs from the records in benchmarks/results.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

from revtrain.memory import DepthCost, StepCost
from revtrain.plots import plot_memory

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"


def main() -> None:
    record = json.loads((RESULTS / "depth.json").read_text(encoding="utf-8"))
    costs = [
        DepthCost(**(cost | {mode: StepCost(**cost[mode]) for mode in ("reversing", "stored")}))
        for cost in record["depths"]
    ]
    plot_memory(costs, record["model"], [ASSETS / "memory.svg"])


if __name__ == "__main__":
    main()
