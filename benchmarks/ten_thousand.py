"""Does a net of ten thousand layers learn, and in how much memory?

    python benchmarks/ten_thousand.py --seconds 170 --output FILE.json

A RevNet of basic blocks, with as many in each stage as give that many convolutions one after the
other, learns CIFAR-10 by revtrain's step until its steps or the time are over; the record holds the
loss of each step. Beside it are nets of fewer layers with the same channels and batch: what the
forward pass keeps, the peak of both passes, and the time of a step, reversed; for the shallower
ones stored, too. On CUDA the step is one graph, whose making (warm-up steps included, which are
steps like all others) is told apart; `--eager` does without. The environment variable REVDATA_DIR
names the folder of the data. `--cpu` is for small sizes, such as

    python benchmarks/ten_thousand.py --cpu --data digits --layers 20 60 --channels 4 4 8 8 \
        --batch-size 50 --steps 25 --output FILE.json
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from step import memory, run, warm_up
from torch import Tensor, nn
from ways import Way, by_fixed_point

from revcore import set_reversing
from revdata import Loader
from revtrain.data import load_images, make_loader
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.meter import Meter
from revtrain.net import NetSpec, to_device
from revtrain.nonfinite import NonFiniteLossError
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.provenance import provenance
from revtrain.recipe import Recipe
from revtrain.step import TrainStep

SCHEMES = {"additive": None, "fixed-point": by_fixed_point}
STARTED = time.perf_counter()
_WARM_UP = 5  # three steps before the capture, the capture, one more
_CHUNK = 10  # steps between two looks at the clock, which wait for the device
_TIMED = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[120, 1200, 10_000])
    parser.add_argument("--channels", type=int, nargs=4, default=[16, 16, 32, 64])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--no-verify", action="store_true", help="read repackaged files")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300, help="of the deepest net, at most")
    parser.add_argument("--seconds", type=float, default=170, help="for all of it, about")
    parser.add_argument("--lr", type=float, default=0.1, help="the peak of one cycle over --steps")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--scheme", default="additive", choices=list(SCHEMES))
    parser.add_argument("--recompute", action="store_true", help="stem, transitions and head too")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output (={arguments.output}) is in a folder that does not exist")
    accelerator = make_accelerator(cpu=arguments.cpu, mixed_precision=arguments.precision)
    images = load_images(
        arguments.data, "train", data_dir=None, verify=not arguments.no_verify, download=False
    )
    size = arguments.batch_size
    augment = arguments.data != "digits"
    loader = make_loader(
        images, size, accelerator, train=True, augment=augment, seed=arguments.seed
    )
    *shallower, deepest = sorted(arguments.layers)
    sizes = (len(images.classes), images.images.shape[1])
    record: dict[str, Any] = {
        "question": "Does a net of ten thousand layers learn, and in how much memory?",
        "data": arguments.data,
        "batch": [size, *images.images.shape[1:]],
        "channels": arguments.channels,
        "precision": arguments.precision,
        "scheme": arguments.scheme,
        "recompute": arguments.recompute,
        "rows": [],
    }
    for layers in shallower:
        for reversing in (False, True):
            net = Subject(layers, sizes, arguments, accelerator, reversing=reversing)
            record["rows"].append(net.measure(*next(batches(loader))))
            print(record["rows"][-1], flush=True)
            net.free()
    net = Subject(deepest, sizes, arguments, accelerator)
    row, training = net.train(loader, STARTED + arguments.seconds)
    record["rows"].append(row)
    print(row, flush=True)
    record["training"] = training
    losses = training["losses"]
    print(f"{len(losses)} steps, {training['seconds']:.1f} s: loss {losses[0]:.3f} to", end=" ")
    print(f"{statistics.mean(losses[-10:]):.3f} in the last ten")
    if arguments.output:
        write_json(arguments.output, record | provenance(accelerator))


def batches(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Makes batches without end."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def make_spec(layers: int, sizes: tuple[int, int], channels: list[int]) -> NetSpec:
    """Returns the smallest RevNet, with equal stages, of so many convolutions in a row."""

    def of(blocks: int) -> NetSpec:
        return NetSpec.of("revnet110", *sizes, (blocks,) * 3, tuple(channels))

    blocks = max(1, math.ceil((layers - 1) / 12))
    while convolutions(of(blocks), channels) < layers:
        blocks += 1
    return of(blocks)


def convolutions(spec: NetSpec, channels: list[int]) -> int:
    """Counts them along the longest path; a reversible block has four, an ordinary one two."""
    ordinary = len(spec.blocks) - int(channels[0] == channels[1])
    return 1 + 4 * sum(spec.blocks) - 2 * ordinary


class Subject:
    """A net with its step."""

    def __init__(
        self,
        layers: int,
        sizes: tuple[int, int],
        arguments: argparse.Namespace,
        accelerator: Accelerator,
        *,
        reversing: bool = True,
    ) -> None:
        self.accelerator, self.steps = accelerator, arguments.steps
        spec = make_spec(layers, sizes, arguments.channels)
        self.way = Way(
            SCHEMES[arguments.scheme],
            reversing=reversing,
            recompute=arguments.recompute and reversing,
        )
        started = time.perf_counter()
        net = to_device(self.way.build(spec, arguments.seed), accelerator.device)
        set_reversing(net, reversing)  # a way's own chains reverse
        recipe = Recipe(
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            schedule="one-cycle",
            steps=arguments.steps,
            nesterov=True,
            weight_decay=5e-4,
        )
        optimizer = make_optimizer(net, recipe)
        # Timed nets may take more steps than are trained.
        length = max(arguments.steps, _WARM_UP + _TIMED)
        scheduler = make_scheduler(optimizer, recipe, length)
        prepared = accelerator.prepare(net, optimizer, scheduler)
        self.net: nn.Module = prepared[0]
        self.step = TrainStep(
            *prepared, accelerator, label_smoothing=0.0, graph=not arguments.eager
        )
        self.row: dict[str, Any] = {
            "convolutions": convolutions(spec, arguments.channels),
            "blocks": spec.blocks[0],
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "reversing": reversing,
            "build_seconds": time.perf_counter() - started,
        }

    def measure(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        """Measures memory and time of a step on one batch."""
        self._weigh(x, labels)
        started = time.perf_counter()
        warm_up(self.step, x, labels)
        self._tell_launch(started)
        self.row["step_ms"] = statistics.median(run(self.step, x, labels, _TIMED))
        return self.row

    def train(self, loader: Loader, deadline: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measures memory, then trains until the steps or the time are over."""
        source = batches(loader)
        self._weigh(*next(source))
        meters: list[Meter] = []
        times: list[float] = []
        error = None
        began = time.perf_counter()
        try:
            while len(meters) < self.steps and (not meters or time.perf_counter() < deadline):
                started = time.perf_counter()
                chunk = min(_CHUNK if meters else _WARM_UP, self.steps - len(meters))
                for _ in range(chunk):
                    x, labels = next(source)
                    meters.append(Meter(x.device))
                    self.step(x, labels, meters[-1])
                self._wait()
                if len(meters) == chunk:
                    self._tell_launch(started)
                else:
                    times.append(1e3 * (time.perf_counter() - started) / chunk)
            self.step.check()
        except NonFiniteLossError as bad:
            error = str(bad)
        seconds = time.perf_counter() - began
        self.row["step_ms"] = statistics.median(times) if times else None
        found = [meter.read() for meter in meters]
        return self.row, {
            "steps": len(found),
            "planned_steps": self.steps,
            "seconds": seconds,
            "losses": [average.loss for average in found],
            "accuracies": [average.accuracy for average in found],
            "error": error,
        }

    def free(self) -> None:
        """Gives the memory back."""
        del self.net, self.step
        self.accelerator.free_memory()
        gc.collect()

    def _weigh(self, x: Tensor, labels: Tensor) -> None:
        kept, peak = memory(self.net, x, labels, self.way)
        self.row |= {"kept_bytes": kept, "peak_bytes": peak}

    def _tell_launch(self, started: float) -> None:
        self._wait()
        self.row["first_steps_seconds"] = time.perf_counter() - started
        self.row["launch"] = "graph" if self.step.captured else "eager"
        self.row["why_no_graph"] = self.step.why_no_graph

    def _wait(self) -> None:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize(self.accelerator.device)


if __name__ == "__main__":
    main()
