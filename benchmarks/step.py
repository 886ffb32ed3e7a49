"""What does a training step cost, stored, reversed, and by other libraries?

    python benchmarks/step.py --model revnet164 --batch-size 100 --output FILE.json

The step is revtrain's own (forward and backward pass, mask, SGD with momentum), for all ways the
same, launched from Python (eager) and as one CUDA graph. All ways of a precision are timed in turns
within one run, in rounds of a few steps; numbers are medians over all steps, by events of the
device. Memory is what the allocator says above weights, gradients and momenta. Images are random
numbers: they cost what real ones cost. `--cpu` is for small sizes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from ways import WAYS, Way, block_modes, version_of

from revcore import track_memory
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.meter import Meter
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.provenance import provenance
from revtrain.recipe import Recipe
from revtrain.step import TrainStep

RECIPE = Recipe(batch_size=1, lr=1e-3, schedule="steps", epochs=1, nesterov=True, weight_decay=5e-4)
_STEPS_PER_ROUND = 12
_LEAST_ROUNDS = 2
_WARM_UP = 5  # three steps before the capture, the capture, one more


@dataclass
class Row:
    """One way of running the step, and what it cost."""

    way: str
    precision: str
    graph: bool
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    setup_seconds: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        quarters = statistics.quantiles(self.step_ms, n=4) if len(self.step_ms) > 1 else []
        return {
            "way": self.way,
            "precision": self.precision,
            "launch": "graph" if self.graph else "eager",
            "step_ms": statistics.median(self.step_ms) if self.step_ms else None,
            "quartiles_ms": quarters[::2],
            "steps": len(self.step_ms),
            "kept_bytes": self.kept_bytes,
            "peak_bytes": self.peak_bytes,
            "setup_seconds": self.setup_seconds,
            "error": self.error,
        }


def main() -> None:
    arguments = parse()
    device = torch.device("cpu" if arguments.cpu or not torch.cuda.is_available() else "cuda")
    spec = NetSpec.of(
        arguments.model,
        10,
        3,
        tuple(arguments.blocks) if arguments.blocks else None,
        tuple(arguments.channels) if arguments.channels else None,
    )
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    launches = [launch == "graph" for launch in arguments.launch]
    if device.type != "cuda":
        launches = [False]
    rows, modes = [], {}
    for position, precision in enumerate(arguments.precision):
        deadline = time.perf_counter() + (
            (arguments.seconds - (time.perf_counter() - STARTED))
            / (len(arguments.precision) - position)
        )
        accelerator = make_accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        found, modes = measure(spec, arguments, accelerator, launches, deadline)
        rows += found
    record = {
        "question": "What does a training step cost?",
        "model": spec.to_json(),
        "batch": [arguments.batch_size, 3, arguments.image_size, arguments.image_size],
        "cudnn_benchmark": arguments.cudnn_benchmark,
        "peers": {name: version_of(name) for name in ("memcnn", "revtorch", "revlib")},
        "block_modes": modes,
        "rows": [row.to_json() for row in rows],
    }
    record |= provenance(accelerator)
    if arguments.output:
        write_json(arguments.output, record)
    show(record)


STARTED = time.perf_counter()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet164")
    parser.add_argument("--blocks", type=int, nargs="+", help="instead of the net's own")
    parser.add_argument("--channels", type=int, nargs="+", help="instead of the net's own")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--precision", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    parser.add_argument(
        "--launch", nargs="+", default=["eager", "graph"], choices=["eager", "graph"]
    )
    usual = [name for name, way in WAYS.items() if not way.compiled]
    parser.add_argument("--ways", nargs="+", default=usual, choices=list(WAYS), metavar="WAY")
    parser.add_argument("--compiled", action="store_true", help="add the compiled ways, minutes")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    parser.add_argument("--seconds", type=float, default=200, help="for all of it, about")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output (={arguments.output}) is in a folder that does not exist")
    if arguments.compiled:
        arguments.ways += [name for name, way in WAYS.items() if way.compiled]
    return arguments


def measure(
    spec: NetSpec,
    arguments: argparse.Namespace,
    accelerator: Accelerator,
    launches: list[bool],
    deadline: float,
) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """Measures all ways in one precision, and tells the mode of each of their blocks."""
    device = accelerator.device
    size = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    x = torch.randn(size, device=device).to(memory_format=memory_format(device))
    labels = torch.randint(10, size[:1], device=device)
    rows, modes, running = [], {}, []
    for name in arguments.ways:
        way = WAYS[name]
        # A net of its own for each launch: BatchNorm is fused where the step becomes a graph. What
        # is compiled is compiled for one of them.
        for graph in launches[-1:] if way.compiled else launches:
            started = time.perf_counter()
            row = Row(name, accelerator.mixed_precision, graph)
            rows.append(row)
            try:
                if way.absent:
                    raise ModuleNotFoundError(way.absent)
                net = to_device(way.build(spec), device)
                modes[name] = block_modes(net)
                optimizer = make_optimizer(net, RECIPE)
                scheduler = make_scheduler(optimizer, RECIPE, 1)
                prepared = accelerator.prepare(net, optimizer, scheduler)
                step = TrainStep(*prepared, accelerator, label_smoothing=0.0, graph=graph)
                # Compiled twice: the step casts the weights before.
                with way.compiling():
                    row.kept_bytes, row.peak_bytes = memory(prepared[0], x, labels, way)
                    warm_up(step, x, labels)
                if graph and not step.captured:
                    raise RuntimeError(f"no graph: {step.why_no_graph}")
            except Exception as error:  # noqa: BLE001 - a peer may fail in any way; the row says how
                row.error = explain(error)
                continue
            row.setup_seconds = time.perf_counter() - started
            running.append((row, step))
        print(f"{name}, {accelerator.mixed_precision}: ready", flush=True)
    # While one way is timed, the collector must not look through the nets of all others.
    gc.collect()
    gc.freeze()
    rounds = 0
    while running and (rounds < _LEAST_ROUNDS or time.perf_counter() < deadline):
        for row, step in list(running):
            try:
                row.step_ms += run(step, x, labels, _STEPS_PER_ROUND)
            except Exception as error:  # noqa: BLE001, PERF203 - out of memory, say
                row.error = explain(error)
                running.remove((row, step))
        rounds += 1
    gc.unfreeze()
    accelerator.free_memory()
    return rows, modes


def explain(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def memory(net: nn.Module, x: Tensor, labels: Tensor, way: Way) -> tuple[int | None, int | None]:
    """Returns bytes kept after the forward pass, and the peak of both passes."""

    def loss() -> Tensor:
        return F.cross_entropy(net(x), labels)

    loss().backward()  # makes the gradients, which are no activations
    gc.collect()  # or what is left of another way is freed amid the count
    if x.device.type == "cuda":
        torch.cuda.empty_cache()  # or the allocator counts the rest of a larger piece that it gives
    try:
        if x.device.type != "cuda":
            if way.package == "memcnn" or way.compiled:
                # One resizes storages, which the counter of operations cannot see; and while
                # operations are counted, compiled nets run as they were written.
                return None, None
            with track_memory() as tracked:
                total = loss()
                kept = tracked.live_bytes
                total.backward()
            return kept, tracked.peak_bytes
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        total = loss()
        kept = torch.cuda.memory_allocated() - before
        total.backward()
        torch.cuda.synchronize()
        return kept, torch.cuda.max_memory_allocated() - before
    finally:
        net.zero_grad(set_to_none=True)


def warm_up(step: TrainStep, x: Tensor, labels: Tensor) -> None:
    """Takes the first steps, up to the graph and once with it."""
    run(step, x, labels, _WARM_UP)


def run(step: TrainStep, x: Tensor, labels: Tensor, count: int) -> list[float]:
    """Takes steps; returns the milliseconds of all but the first, which finds an idle device."""
    meter = Meter(x.device)
    if x.device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            step(x, labels, meter)
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(times[1:])]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step(x, labels, meter)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events[1:])]


def show(record: dict[str, Any]) -> None:
    """Prints the table."""
    for precision in dict.fromkeys(row["precision"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["precision"] == precision]
        table = Table(
            title=f"{record['model']['model']}, batch {record['batch'][0]}, precision {precision}"
        )
        for column in ("way", "launch", "ms", "of stored", "kept MB", "peak MB", "ready s"):
            table.add_column(column, justify="left" if column in ("way", "launch") else "right")
        stored = {row["launch"]: row["step_ms"] for row in rows if row["way"] == "stored"}
        for row in rows:
            if row["error"]:
                table.add_row(row["way"], row["launch"], row["error"])
                continue
            base = stored.get(row["launch"])
            table.add_row(
                *(row["way"], row["launch"], f"{row['step_ms']:.2f}"),
                f"{row['step_ms'] / base:.3f}" if base else "",
                *(f"{row[k] / 1e6:.1f}" if row[k] else "" for k in ("kept_bytes", "peak_bytes")),
                f"{row['setup_seconds']:.1f}",
            )
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
