"""Which kinds of kernels take the time of a training step?

    python benchmarks/kernels.py --model revnet164 --precision bf16 --output FILE.json

The step is revtrain's own, as one CUDA graph, under torch's profiler. The times are those of the
kernels alone; the difference to the time of a step is what the device waits. Needs CUDA.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from step import RECIPE, run, warm_up
from torch.profiler import ProfilerActivity, profile
from ways import WAYS

from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.meter import Meter
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.provenance import provenance
from revtrain.step import TrainStep

# The first that matches a kernel's name.
KINDS = {
    # By their own names, before any other kind.
    "batch norm with convolution": r"^convolve$|^(activation|matrix)_gradient|^add_up",
    "batch norm": r"batch_?norm|bn_(fw|bw)|welford|^(merge_)?(moments|sums)|^normalize"
    r"|^gradient_sums|^input_gradient",
    "convolution": r"conv|xmma|cutlass|implicit|gemm|wgrad|dgrad|fprop|winograd|sm\d+_",
    "transpose": r"nchw|nhwc|transpose",
    "optimizer, mask": r"multi_tensor|foreach|fused_sgd|lpnorm",
    "triton": r"^triton_",
    "cast, copy": r"copy|memcpy|memset|cast",
    "reduction": r"reduce",
    "elementwise": r"elementwise|threshold|where|fill|clamp",
}


def kind_of(kernel: str) -> str:
    lowered = kernel.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lowered)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet164")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--ways", nargs="+", default=["stored", "revcore"], choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, whose kernels could be timed")
    accelerator = make_accelerator(cpu=False, mixed_precision=arguments.precision)
    device = accelerator.device
    spec = NetSpec.of(arguments.model, 10, 3)
    x = torch.randn(arguments.batch_size, 3, 32, 32, device=device)
    x = x.to(memory_format=memory_format(device))
    labels = torch.randint(10, (arguments.batch_size,), device=device)
    rows = {}
    for name in arguments.ways:
        net = to_device(WAYS[name].build(spec), device)
        optimizer = make_optimizer(net, RECIPE)
        prepared = accelerator.prepare(net, optimizer, make_scheduler(optimizer, RECIPE, 1))
        step = TrainStep(*prepared, accelerator, label_smoothing=0.0)
        warm_up(step, x, labels)
        milliseconds = run(step, x, labels, arguments.steps)
        rows[name] = measure(step, x, labels, arguments.steps)
        rows[name]["step_ms"] = sorted(milliseconds)[len(milliseconds) // 2]
        show(name, rows[name])
    record = {
        "question": "Which kinds of kernels take the time of a training step?",
        "model": spec.to_json(),
        "batch": list(x.shape),
        "precision": arguments.precision,
        "ways": rows,
    }
    write_json(arguments.output, record | provenance(accelerator))


def measure(step: TrainStep, x: torch.Tensor, labels: torch.Tensor, steps: int) -> dict[str, Any]:
    """Profiles steps; returns milliseconds and launches a step, by kind and for the longest."""
    meter = Meter(x.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step(x, labels, meter)
        torch.cuda.synchronize()
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"ms": 0.0, "launches": 0.0})
    kernels = []
    for event in profiler.key_averages():
        milliseconds, launches = event.self_device_time_total / 1e3 / steps, event.count / steps
        if not milliseconds:
            continue
        kernels.append({"kernel": event.key[:120], "ms": milliseconds, "launches": launches})
        kind = kinds[kind_of(event.key)]
        kind["ms"] += milliseconds
        kind["launches"] += launches
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {
        "kernel_ms": sum(kind["ms"] for kind in kinds.values()),
        "launches": sum(kind["launches"] for kind in kinds.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"])),
        "kernels": kernels[:25],
    }


def show(name: str, row: dict[str, Any]) -> None:
    print(
        f"{name}: {row['step_ms']:.2f} ms a step, {row['kernel_ms']:.2f} ms in "
        f"{row['launches']:.0f} kernels"
    )
    for kind, costs in row["kinds"].items():
        print(f"  {kind:16} {costs['ms']:8.3f} ms {costs['launches']:8.0f}")


if __name__ == "__main__":
    main()
