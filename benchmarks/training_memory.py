"""How much GPU memory does each network take in training?

    python benchmarks/training_memory.py --output FILE.json

For each network, in a process of its own: what the forward pass leaves behind, the allocator's
peak, and the memory in use on the device as the driver reports it after some steps (libraries and
CUDA's own included, and what others have in use; what that was before is in the record, if
nvidia-smi can tell), at a batch of 100 in float32, as MemCNN's were measured. Needs CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from step import RECIPE, memory, run
from ways import Way

from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.provenance import provenance
from revtrain.step import TrainStep

NETS = ("resnet32", "resnet110", "resnet164", "revnet38", "revnet110", "revnet164")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS, metavar="NET")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, whose memory could be measured")
    if arguments.one:
        print(json.dumps(measure(arguments.nets[0], arguments)))
        return
    rows = []
    for net in arguments.nets:
        before = used()
        words = ["--one", "--nets", net, "--batch-size", str(arguments.batch_size)]
        words += ["--precision", arguments.precision]
        done = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, check=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row | {"driver_bytes_before": before})
        print(rows[-1], flush=True)
    record = {
        "question": "How much GPU memory does each network take in training?",
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "rows": rows,
    }
    accelerator = make_accelerator(cpu=False, mixed_precision=arguments.precision)
    if arguments.output:
        write_json(arguments.output, record | provenance(accelerator))


def used() -> int | None:
    """Returns the memory in use before a process of ours is there, if nvidia-smi can tell."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    # It numbers all devices of the machine, whichever are visible to programs.
    words += ["-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return int(done.stdout.split()[0]) << 20


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    accelerator = make_accelerator(cpu=False, mixed_precision=arguments.precision)
    device = accelerator.device
    net = to_device(Way().build(NetSpec.of(name, 10, 3)), device)
    optimizer = make_optimizer(net, RECIPE)
    prepared = accelerator.prepare(net, optimizer, make_scheduler(optimizer, RECIPE, 1))
    x = torch.randn(arguments.batch_size, 3, 32, 32, device=device)
    x = x.to(memory_format=memory_format(device))
    labels = torch.randint(10, (arguments.batch_size,), device=device)
    kept, peak = memory(prepared[0], x, labels, Way())
    row: dict[str, Any] = {"net": name, "kept_bytes": kept, "peak_bytes": peak}
    for graph in (False, True):
        torch.cuda.empty_cache()
        step = TrainStep(*prepared, accelerator, label_smoothing=0.0, graph=graph)
        run(step, x, labels, 10)
        free, total = torch.cuda.mem_get_info(device)
        row["driver_bytes_graph" if graph else "driver_bytes_eager"] = total - free
    return row


if __name__ == "__main__":
    main()
