"""How many images a second does each loader make, and does it hold up the training step?

Usage: `REVDATA_DIR=FOLDER python benchmarks/loaders.py --output FILE.json [--cuda]`

Each loader runs alone over augmented CIFAR-10. Then one network takes steps twice in turns: with
one batch again and again, and with batches that the loader makes; on a GPU the clock is stopped
when the device has finished. What the second takes more is what the loader costs a step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import revdata
import revmodels
from revtrain.files import write_json
from revtrain.net import memory_format, to_device
from revtrain.provenance import provenance

LOADERS: dict[str, dict[str, Any]] = {
    "device": {},
    "torch, 0 workers": {"num_workers": 0},
    "torch, 2 workers": {"num_workers": 2},
}
SECONDS_ALONE = 5.0
STEPS = {"cpu": 3, "cuda": 50}
ROUNDS = 3
Batch = tuple[Tensor, Tensor]


def make(name: str, images: revdata.ImageSet, batch: int, device: torch.device) -> revdata.Loader:
    kind = revdata.DeviceLoader if name == "device" else revdata.TorchLoader
    return kind(
        images,
        batch,
        device=device,
        augment=True,
        shuffle=True,
        drop_last=True,
        memory_format=memory_format(device),
        **LOADERS[name],
    )


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def endless(loader: revdata.Loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader
        loader.set_epoch(loader.epoch + 1)


def alone(loader: revdata.Loader, device: torch.device) -> float:
    """Images per second, the start of an epoch included."""
    batches = endless(loader)
    next(batches)
    wait_for(device)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS_ALONE:
        for _ in range(20):
            images += len(next(batches)[1])
        wait_for(device)
    return images / (time.perf_counter() - started)


def seconds_per_step(step: Any, batches: Iterator[Batch], device: torch.device) -> float:
    steps = STEPS[device.type]
    wait_for(device)
    started = time.perf_counter()
    for _ in range(steps):
        step(*next(batches))
    wait_for(device)
    return (time.perf_counter() - started) / steps


def beside_a_step(name: str, images: revdata.ImageSet, batch: int, accelerator: Accelerator) -> Any:
    """Medians of a step with one batch, and of a step with this loader, in milliseconds."""
    device = accelerator.device
    net: nn.Module = to_device(revmodels.create_model("revnet38"), device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def step(x: Tensor, labels: Tensor) -> None:
        with accelerator.autocast():
            loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    fed = endless(make(name, images, batch, device))
    same = next(fed)
    times: dict[str, list[float]] = {"same batch": [], "loader": []}
    for round_ in range(ROUNDS + 1):
        for way, batches in (("same batch", itertools.repeat(same)), ("loader", fed)):
            seconds = seconds_per_step(step, batches, device)
            if round_:  # the first chooses kernels
                times[way].append(seconds)
    fixed, with_loader = (statistics.median(times[way]) * 1e3 for way in times)
    return {"step_ms_same_batch": fixed, "step_ms_with_loader": with_loader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cuda", action="store_true", help="on the GPU, in bf16")
    arguments = parser.parse_args()
    precision = "bf16" if arguments.cuda else "no"
    accelerator = Accelerator(cpu=not arguments.cuda, mixed_precision=precision)
    device = accelerator.device
    images = revdata.load("cifar10", "train")
    records = []
    for batch in (100, 250):
        for name in LOADERS:
            loader = make(name, images, batch, device)
            rate = alone(loader, device)
            record = {"loader": name, "batch": batch, "images_per_second": rate}
            record["batch_ms"] = batch / rate * 1e3
            record |= beside_a_step(name, images, batch, accelerator)
            record["added_to_step"] = record["step_ms_with_loader"] / record["step_ms_same_batch"]
            records.append(record)
            print(record, flush=True)
    write_json(
        arguments.output,
        {
            **provenance(accelerator),
            "data": "cifar10, augmented",
            "model": "revnet38",
            "loaders": records,
        },
    )


if __name__ == "__main__":
    main()
