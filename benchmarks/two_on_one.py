"""Do two processes on one device train as one does, by DistributedDataParallel over gloo?

    python benchmarks/two_on_one.py --output benchmarks/results/two-on-one-cuda.json

NCCL gives each process a device of its own; gloo lets two share one. Both take halves of the same
batches, and their losses, averaged, and weights are compared with those of one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import revmodels
from revtrain.files import write_json
from revtrain.net import to_device
from revtrain.provenance import provenance
from revtrain.sync_batchnorm import synchronize_batchnorm

PROCESSES = 2


def train(
    model: nn.Module, device: torch.device, steps: int, rank: int, processes: int
) -> list[float]:
    """Takes steps on random images; returns this process's losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(100, 3, 32, 32, generator=generator).chunk(processes)[rank].to(device)
        labels = torch.randint(10, (100,), generator=generator).chunk(processes)[rank].to(device)
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make(name: str, device: torch.device) -> nn.Module:
    # Rounding differs between one process and two; TF32 would make much of it.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    return to_device(revmodels.create_model(name, num_classes=10), device)


def work(rank: int, chosen: argparse.Namespace, folder: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES
    )
    device = torch.device(chosen.device)
    net = synchronize_batchnorm(make(chosen.model, device), device)
    model = nn.parallel.DistributedDataParallel(net)
    losses = train(model, device, chosen.steps, rank, PROCESSES)
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    torch.save({"losses": losses, "weights": weights}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The difference of two states, relative to the size of the second."""
    names = [name for name in a if a[name].is_floating_point()]
    one, other = (torch.cat([state[name].double().flatten() for name in names]) for state in (a, b))
    return ((one - other).norm() / other.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet38")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (chosen, folder), nprocs=PROCESSES)
        first, second = (torch.load(f"{folder}/{rank}.pt") for rank in range(PROCESSES))
    net = make(chosen.model, device)
    alone = train(net, device, chosen.steps, 0, 1)
    together = [sum(pair) / 2 for pair in zip(first["losses"], second["losses"], strict=True)]
    one = {name: value.cpu() for name, value in net.state_dict().items()}
    result: dict[str, Any] = {
        **provenance(Accelerator(cpu=device.type == "cpu")),
        "model": chosen.model,
        "steps": chosen.steps,
        "losses_of_one": alone,
        "losses_of_two": together,
        "ranks_have_the_same_weights": all(
            value.equal(second["weights"][name]) for name, value in first["weights"].items()
        ),
        "largest_relative_difference_of_losses": max(
            abs(a - b) / abs(b) for a, b in zip(together, alone, strict=True)
        ),
        "relative_difference_of_weights": difference(first["weights"], one),
    }
    write_json(chosen.output, result)
    for name in list(result)[-3:]:
        print(f"{name}: {result[name]}")
    good = (
        result["ranks_have_the_same_weights"]
        and result["largest_relative_difference_of_losses"] < chosen.tolerance
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
