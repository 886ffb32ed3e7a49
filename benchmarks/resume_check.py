"""Does a run that was stopped amid an epoch end with the same bits, on this device?

    python benchmarks/resume_check.py --output benchmarks/results/resume-cuda.json

trains a network three times in processes of their own, with `--deterministic`: undisturbed; stopped
by SIGTERM and resumed; killed (kill -9, of one process if there are several) and resumed. Compares
weights, optimizer, schedule, random states and metrics of the last checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "packages" / "revtrain" / "tests"))

from runs import assert_same_run, checkpoints  # noqa: E402

from revtrain.files import write_json  # noqa: E402

RECIPE = """
batch_size = {batch_size}
steps = {steps}
lr = 0.1
schedule = "one-cycle"
momentum = 0.9
nesterov = true
weight_decay = 5e-4
decay = "weights"
"""


class Runs:
    """Starts the same training run again and again."""

    def __init__(
        self, folder: Path, chosen: argparse.Namespace, launcher: Sequence[str] | None = None
    ) -> None:
        self.folder = folder
        self.chosen = chosen
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(batch_size=chosen.batch_size, steps=chosen.steps))
        self.words = ["-m", "revtrain", "train", "--data", chosen.data, "--model", chosen.model]
        self.words += ["--recipe", str(recipe), "--mixed-precision", chosen.mixed_precision]
        self.words += ["--deterministic", "--resume", "--no-memory"]
        self.words += ["--save-every", str(max(1, chosen.steps // 10)), *chosen.train]
        if chosen.processes > 1:
            usual = ["-m", "torch.distributed.run", "--standalone"]
            usual += [f"--nproc-per-node={chosen.processes}"]
            self.words = [*(launcher or usual), *self.words]

    def start(self, name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *self.words, "--out", str(self.folder / name)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        )

    def finish(self, name: str) -> float:
        """Runs, or goes on, to the end; returns seconds."""
        started = time.perf_counter()
        process = self.start(name)
        _, err = process.communicate()
        if process.returncode:
            raise SystemExit(err)
        return round(time.perf_counter() - started, 2)

    def stop(self, name: str, signum: signal.Signals) -> int:
        """Starts a run, stops it after its second checkpoint; returns the step that is saved."""
        out = self.folder / name
        process = self.start(name)
        while len(checkpoints(out)) < 2 and process.poll() is None:
            time.sleep(0.005)
        trainers = psutil.Process(process.pid).children() if self.chosen.processes > 1 else []
        victim = trainers[-1].pid if trainers else process.pid
        os.kill(victim, signum)
        _, err = process.communicate()
        saved = int(checkpoints(out)[-1].name.removeprefix("step-"))
        if process.returncode == 0 or saved >= self.chosen.steps:
            raise SystemExit(f"the run was over before it could be stopped: --steps more\n{err}")
        return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="revnet38")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("train", nargs="*", metavar="-- OPTION", help="for revtrain train")
    chosen = parser.parse_args()
    result: dict[str, Any] = {"command": f"python {' '.join(sys.argv)}", **vars(chosen)}
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        runs = Runs(Path(name), chosen)
        result["undisturbed_seconds"] = runs.finish("whole")
        result["stops"] = []
        for signum in (signal.SIGTERM, signal.SIGKILL):
            saved = runs.stop(signum.name, signum)
            seconds = runs.finish(signum.name)
            try:
                assert_same_run(runs.folder / signum.name, runs.folder / "whole")
            except AssertionError as error:
                same, what = False, f"differs: {error}"[:200]
            else:
                same, what = True, "weights, optimizer, schedule, random states and metrics"
            stop = {"by": signum.name, "resumed_after_step": saved, "resume_seconds": seconds}
            result["stops"].append({**stop, "same_bits": same, "compared": what})
            print(json.dumps(result["stops"][-1]), flush=True)
        config = json.loads((runs.folder / "whole" / "config.json").read_text())
    result |= {name: config[name] for name in ("date", "versions", "hardware")}
    write_json(chosen.output, result)
    raise SystemExit(0 if all(stop["same_bits"] for stop in result["stops"]) else 1)


if __name__ == "__main__":
    main()
