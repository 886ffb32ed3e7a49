"""Several GPUs of one machine: is training the same, how fast is it, and is resuming exact?

    python benchmarks/several_gpus.py --output benchmarks/results/several-gpus.json

starts, each time in processes of their own (`accelerate launch --multi_gpu`, NCCL):

- the same training run on one GPU and on all of them, of the same global batch, and on one GPU with
  stored activations, which rounds in other ways too: samples, losses, weights of all ranks;
- a run of which one rank is killed (kill -9) amid an epoch, resumed, against one left alone: bits;
- steps of deep networks on one GPU and on all of them: images per second, memory of each rank, with
  and without overlap of the all-reduce, and when gradients become ready.

The record is written after each part. `--cpu` does the same in two processes over gloo
(`torchrun`), with networks so small that it takes a minute; its numbers mean nothing.
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
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from resume_check import Runs, assert_same_run

from revtrain.files import read_json, write_json
from revtrain.provenance import provenance

HERE = Path(__file__).parent
STARTED = time.perf_counter()
_FIRST = 10  # steps in which rounding has not grown yet
_TINY = {"blocks": (2, 2, 2), "channels": (4, 4, 8, 8)}


class PartError(Exception):
    """A part came to no result."""


class Parts:
    """Starts the parts, and knows the two launchers."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen = chosen
        self.folder = folder
        self.environment = dict(os.environ)
        if chosen.cpu:
            self.environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    @property
    def left(self) -> float:
        """Seconds until all must be done."""
        return float(self.chosen.seconds - (time.perf_counter() - STARTED))

    def launcher(self, processes: int) -> list[str]:
        if processes == 1:
            return []
        if self.chosen.cpu:
            return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
        words += [str(processes), "--num_machines", "1", "--main_process_port", "0"]
        return [*words, "--mixed_precision", "no", "--dynamo_backend", "no"]

    def run(self, processes: int, script: str, *words: object, seconds: float) -> dict[str, Any]:
        """Runs a script to its end, or until the time is over, and returns what it wrote."""
        output = self.folder / f"{script}-{time.monotonic_ns()}.json"
        command = [sys.executable, *self.launcher(processes), str(HERE / script)]
        command += [*map(str, words), "--output", str(output)]
        with subprocess.Popen(
            command, env=self.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                _, err = process.communicate(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                _, err = process.communicate()
                err += f"\nstopped after {seconds:.0f} s"
        if not output.exists():
            raise PartError(err[-3000:])
        record: dict[str, Any] = read_json(output)
        if process.returncode:
            record["error"] = err[-3000:]
        return record


def same_curve(parts: Parts) -> dict[str, Any]:
    """Trains on one process and on all."""
    chosen = parts.chosen
    config = {"data": chosen.data, "model": "revnet38", "epochs": chosen.epochs}
    config |= {"batch_size": chosen.batch_size, **(_TINY if chosen.cpu else {})}
    runs = {}
    for name, processes, more in (
        ("one", 1, {}),
        ("several", chosen.processes, {}),
        ("one_stored", 1, {"stored": True}),
    ):
        values = json.dumps({**config, **more, "out": str(parts.folder / name)})
        run = parts.run(processes, "several_gpus_train.py", values, seconds=parts.left / 2)
        if "error" in run:
            raise PartError(run["error"])
        runs[name] = run
        print(f"{name}: {run['epochs'][-1]}", flush=True)
    one, several, stored = runs["one"], runs["several"], runs["one_stored"]
    result = {
        **config,
        "tf32": False,
        "same_samples": one["samples"] == several["samples"],
        "ranks_have_the_same_weights": len(set(several["weights_of_ranks"])) == 1,
        "ranks": len(several["weights_of_ranks"]),
    }
    for name, other in (("several", several), ("one_stored", stored)):
        gaps = [abs(a - b) / abs(b) for a, b in zip(*losses(other, one), strict=True)]
        result[f"{name}_against_one"] = {
            "first_steps_largest_relative_difference_of_loss": max(gaps[:_FIRST]),
            "largest_relative_difference_of_loss": max(gaps),
            "relative_difference_of_train_loss_by_epoch": [
                abs(a["train_loss"] - b["train_loss"]) / b["train_loss"]
                for a, b in zip(other["epochs"], one["epochs"], strict=True)
            ],
        }
    for name, run in runs.items():
        result[name] = {"step_losses": run["step_losses"], "epochs": run["epochs"]}
    first = result["several_against_one"]["first_steps_largest_relative_difference_of_loss"]
    result["good"] = (
        result["same_samples"]
        and result["ranks_have_the_same_weights"]
        and first < chosen.tolerance
        and several["processes"] == chosen.processes
    )
    return result


def losses(*runs: dict[str, Any]) -> list[list[float]]:
    return [run["step_losses"] for run in runs]


def exact_resume(parts: Parts) -> dict[str, Any]:
    """Kills one rank amid an epoch, resumes, and compares with a run that was left alone."""
    chosen = parts.chosen
    of_run = argparse.Namespace(
        data=chosen.data,
        model="revnet38",
        steps=chosen.resume_steps,
        batch_size=chosen.batch_size,
        mixed_precision="no",
        processes=chosen.processes,
        train=[],
    )
    if chosen.cpu:
        of_run.train = [w for k, v in _TINY.items() for w in (f"--{k}", *map(str, v))]
        os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    runs = Runs(parts.folder, of_run, parts.launcher(chosen.processes))
    whole = runs.finish("whole")
    saved = runs.stop("killed", signal.SIGKILL)
    seconds = runs.finish("killed")
    try:
        assert_same_run(parts.folder / "killed", parts.folder / "whole")
    except AssertionError as error:
        same, what = False, f"differs: {error}"[:200]
    else:
        same, what = True, "weights, optimizer, schedule, random states and metrics"
    return {
        "steps": chosen.resume_steps,
        "killed": "the last rank, by SIGKILL",
        "resumed_after_step": saved,
        "undisturbed_seconds": whole,
        "resume_seconds": seconds,
        "compared": what,
        "good": same,
    }


def speed(parts: Parts) -> dict[str, Any]:
    """Times steps on one process and on all."""
    chosen, result = parts.chosen, {}
    words = ["--models", *chosen.models, "--batch-size", chosen.speed_batch_size]
    words += ["--steps", chosen.speed_steps, "--precision", chosen.precision]
    if chosen.cpu:
        words += ["--cpu", *(w for k, v in _TINY.items() for w in (f"--{k}", *v))]
    # A process needs some seconds until it begins, and a row some after the last moment to begin.
    for name, processes, share in (("several", chosen.processes, 0.75), ("one", 1, 1.0)):
        seconds = parts.left * share
        result[name] = parts.run(
            processes,
            "several_gpus_speed.py",
            *(*words, "--seconds", max(1.0, seconds - 40)),
            seconds=seconds,
        )
    rows = [row for run in result.values() for row in (*run["rows"], *run["readiness"])]
    return {
        "batch_size_of_a_process": chosen.speed_batch_size,
        "precision": chosen.precision,
        "rows": [
            {"processes": r["hardware"]["processes"], **w}
            for r in result.values()
            for w in r["rows"]
        ],
        "readiness": result["several"]["readiness"],
        "errors": {name: run["error"] for name, run in result.items() if "error" in run},
        "good": all("error" not in row for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="two small processes over gloo")
    parser.add_argument("--processes", type=int, help="all GPUs, by default")
    parser.add_argument("--data", help="cifar10, from REVDATA_DIR; digits with --cpu")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes")
    parser.add_argument("--resume-steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", default=["revnet110", "revnet164"])
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--speed-batch-size", type=int, help="of a process", default=256)
    parser.add_argument("--speed-steps", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the first losses")
    parser.add_argument("--seconds", type=float, default=530, help="for all of it")
    parser.add_argument("--parts", nargs="+", default=["curve", "resume", "speed"])
    chosen = parser.parse_args()
    chosen.data = chosen.data or ("digits" if chosen.cpu else "cifar10")
    chosen.processes = chosen.processes or (2 if chosen.cpu else torch.cuda.device_count())
    if chosen.processes < 2:
        parser.error(f"--processes (={chosen.processes}) must be at least 2: one GPU is no several")
    if not chosen.output.parent.is_dir():
        parser.error(f"--output (={chosen.output}) is in a folder that does not exist")
    if chosen.cpu:
        chosen.batch_size, chosen.speed_batch_size, chosen.speed_steps = 100, 8, 3
        chosen.epochs, chosen.resume_steps = 2, 60
    record = provenance(Accelerator(cpu=chosen.cpu))
    record["hardware"]["processes"] = chosen.processes
    if not chosen.cpu:
        record["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    parts: dict[str, Any] = {"curve": same_curve, "resume": exact_resume, "speed": speed}
    with tempfile.TemporaryDirectory(prefix="several-") as name:
        for part in chosen.parts:
            started = time.perf_counter()
            try:
                record[part] = parts[part](Parts(chosen, Path(name)))
            except (PartError, SystemExit, OSError) as error:
                record[part] = {"error": str(error), "good": False}
            record[part]["seconds"] = round(time.perf_counter() - started, 1)
            write_json(chosen.output, record)
            word = "good" if record[part]["good"] else f"NOT good {record[part].get('error', '')}"
            print(f"{part}: {word}, {record[part]['seconds']} s", flush=True)
    sys.exit(0 if all(record[part]["good"] for part in chosen.parts) else 1)


if __name__ == "__main__":
    main()
