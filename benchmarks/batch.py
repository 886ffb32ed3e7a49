"""Which batch fits into so many gigabytes, and how fast is it?

    python benchmarks/batch.py --model revnet164 --gigabytes 8 24 --output FILE.json

The allocator is capped, and the batch is doubled, then halved in, until the largest is found (to
one part in sixteen) for which a training step fits, as it is launched from Python. Its throughput
is that of the same step. Weights, gradients and momenta are in the memory, too; what the driver
itself takes is not. Each way runs in a process of its own. Needs CUDA.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import RECIPE, run
from ways import WAYS

from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.provenance import provenance
from revtrain.step import TrainStep

_LIMIT = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet164")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[8.0, 24.0])
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16"])
    usual = [name for name, way in WAYS.items() if not way.compiled]
    parser.add_argument("--ways", nargs="+", default=usual, choices=list(WAYS), metavar="WAY")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, whose memory could be capped")
    if arguments.one:
        print(json.dumps(measure(arguments, arguments.ways[0], arguments.gigabytes[0])))
        return
    rows = []
    for gigabytes in arguments.gigabytes:
        for name in arguments.ways:
            row = {"way": name, "gigabytes": gigabytes} | in_a_process(arguments, name, gigabytes)
            rows.append(row)
            print(row, flush=True)
    record = {
        "question": "Which batch fits into so many gigabytes, and how fast is it?",
        "model": NetSpec.of(arguments.model, 10, 3).to_json(),
        "precision": arguments.precision,
        "rows": rows,
    }
    accelerator = make_accelerator(cpu=False, mixed_precision=arguments.precision)
    if arguments.output:
        write_json(arguments.output, record | provenance(accelerator))


def in_a_process(arguments: argparse.Namespace, name: str, gigabytes: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", "--model", arguments.model, "--ways", name]
    command += ["--gigabytes", str(gigabytes), "--precision", arguments.precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "no output"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(arguments: argparse.Namespace, name: str, gigabytes: float) -> dict[str, Any]:
    """Returns the largest batch and its images per second."""
    way = WAYS[name]
    if way.absent:
        return {"error": way.absent}
    accelerator = make_accelerator(cpu=False, mixed_precision=arguments.precision)
    device = accelerator.device
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)
    net = to_device(way.build(NetSpec.of(arguments.model, 10, 3)), device)
    optimizer = make_optimizer(net, RECIPE)
    prepared = accelerator.prepare(net, optimizer, make_scheduler(optimizer, RECIPE, 1))

    def steps(batch_size: int, count: int) -> list[float]:
        x = torch.randn(batch_size, 3, 32, 32, device=device)
        x = x.to(memory_format=memory_format(device))
        labels = torch.randint(10, (batch_size,), device=device)
        step = TrainStep(*prepared, accelerator, label_smoothing=0.0, graph=False)
        return run(step, x, labels, count)

    def fits(batch_size: int) -> bool:
        try:
            steps(batch_size, 2)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            net.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        return True

    batch_size = largest(fits)
    milliseconds = statistics.median(steps(batch_size, 6))
    return {
        "batch_size": batch_size,
        "step_ms": milliseconds,
        "images_per_second": 1e3 * batch_size / milliseconds,
    }


def largest(fits: Callable[[int], bool], start: int = 64) -> int:
    """Finds the largest size that fits, to one part in sixteen."""
    good, bad = 0, start
    while bad < _LIMIT and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, bad // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    if not good:
        raise MemoryError(f"not even a batch of {bad} fits")
    return good


if __name__ == "__main__":
    main()
