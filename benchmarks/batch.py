"""How do memory and speed grow with the batch, and which batch fits into so many gigabytes?

    python benchmarks/batch.py --model revnet164 --gigabytes 8 24 --output FILE.json

For each way, in a process of its own, a training step as it is launched from Python. First with
given batches: what the forward pass keeps and the peak of both passes, above weights, gradients and
momenta, and the throughput. Then with a capped allocator: the largest batch (to one part in
sixteen) for which a step fits, and its throughput. Weights, gradients and momenta are in that
memory, too; what the driver itself takes is not. `--cpu` is for small sizes, and without caps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from step import RECIPE, memory, run
from torch import Tensor
from ways import WAYS

from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.provenance import provenance
from revtrain.step import TrainStep

Row = dict[str, Any]

_LIMIT = 1 << 20
_TIMED = 6
USUAL = (
    "stored",
    "revcore",
    "revcore, recomputed",
    "MemCNN",
    "RevTorch",
    "RevLib",
    "checkpoint by block",
    "checkpoint in sqrt segments",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet164")
    parser.add_argument("--blocks", type=int, nargs="+", help="instead of the net's own")
    parser.add_argument("--channels", type=int, nargs="+", help="instead of the net's own")
    parser.add_argument("--batches", type=int, nargs="*", default=[100, 250, 500, 1000])
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[8.0, 24.0])
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--ways", nargs="+", default=USUAL, choices=list(WAYS), metavar="WAY")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output (={arguments.output}) is in a folder that does not exist")
    if arguments.gigabytes and (arguments.cpu or not torch.cuda.is_available()):
        parser.error("a CPU's memory cannot be capped: give --gigabytes without numbers")
    accelerator = make_accelerator(cpu=arguments.cpu, mixed_precision=arguments.precision)
    if arguments.one:
        # Each new size may compile once more, though from the second one on sizes are variables.
        with WAYS[arguments.ways[0]].compiling():
            for row in measure(arguments, arguments.ways[0], accelerator):
                print(json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = []
    record = {
        "question": "Which batch fits into so many gigabytes, and how fast is it?",
        "model": make_spec(arguments).to_json(),
        "precision": arguments.precision,
        "rows": rows,
    }
    for name in arguments.ways:
        for row in in_a_process(name):
            rows.append({"way": name, **row})
            print(rows[-1], flush=True)
        if arguments.output:  # after each way, for one that follows may outlast the time there is
            write_json(arguments.output, record | provenance(accelerator))


def in_a_process(name: str) -> list[Row]:
    """Returns the rows of one way, and why there are no more, if so."""
    words = [*sys.argv[1:], "--one", "--ways", name]
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        found.append({"error": lines[-1]})
    return found


def make_spec(arguments: argparse.Namespace) -> NetSpec:
    return NetSpec.of(
        arguments.model,
        10,
        3,
        tuple(arguments.blocks) if arguments.blocks else None,
        tuple(arguments.channels) if arguments.channels else None,
    )


def measure(arguments: argparse.Namespace, name: str, accelerator: Accelerator) -> Iterator[Row]:
    """Yields a row for each batch, and then the largest batch of each cap."""
    way = WAYS[name]
    if way.absent:
        yield {"error": way.absent}
        return
    device = accelerator.device
    net = to_device(way.build(make_spec(arguments)), device)
    optimizer = make_optimizer(net, RECIPE)
    prepared = accelerator.prepare(net, optimizer, make_scheduler(optimizer, RECIPE, 1))

    def noise(batch_size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch_size, 3, 32, 32, device=device)
        labels = torch.randint(10, (batch_size,), device=device)
        return x.to(memory_format=memory_format(device)), labels

    def speed(batch_size: int, count: int = _TIMED) -> Row:
        step = TrainStep(*prepared, accelerator, label_smoothing=0.0, graph=False)
        milliseconds = statistics.median(run(step, *noise(batch_size), count))
        throughput = 1e3 * batch_size / milliseconds
        return {
            "batch_size": batch_size,
            "step_ms": milliseconds,
            "images_per_second": throughput,
        }

    def attempt(batch_size: int, count: int) -> Row | None:
        try:
            return speed(batch_size, count)
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            clear()

    def clear() -> None:
        net.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()

    bytes_per_image = 0.0
    for batch_size in arguments.batches:
        try:
            kept, peak = memory(prepared[0], *noise(batch_size), way)
            yield {**speed(batch_size), "kept_bytes": kept, "peak_bytes": peak}
            bytes_per_image = (peak or 0) / batch_size
        except torch.cuda.OutOfMemoryError:
            yield {"batch_size": batch_size, "error": "out of memory"}
        clear()
    for gigabytes in arguments.gigabytes:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
        # Begun below what the batches promise, because an attempt takes as long as it is large.
        start = int(0.75e9 * gigabytes / bytes_per_image) if bytes_per_image else 64
        yield {"gigabytes": gigabytes, **largest(attempt, max(1, start))}


def largest(attempt: Callable[[int, int], Row | None], start: int) -> Row:
    """Finds the largest batch whose steps fit, to one part in sixteen; returns its row."""
    good, bad = 0, start
    while bad < _LIMIT and attempt(bad, 2):
        good, bad = bad, 2 * bad
    while bad - good > max(1, bad // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if attempt(middle, 2) else (good, middle)
    while good:
        if row := attempt(good, _TIMED):
            return row
        good -= max(1, good // 16)  # more steps may leave more gaps in the memory
    raise MemoryError(f"not even a batch of {bad} fits")


if __name__ == "__main__":
    main()
