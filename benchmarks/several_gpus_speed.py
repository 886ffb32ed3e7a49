"""The speed part of several_gpus.py: images per second and memory of each way to share a network.

The batch of a process is the same however many there are. A step is forward pass, backward pass
and SGD, launched from Python; on one GPU the same is measured as a CUDA graph as well. A step lasts
as long as on the slowest rank; numbers are medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from revcore import AdditiveCoupling
from revmodels.network import ResidualBlock
from revmodels.revnet import ReversibleStage
from revtrain.capture import CapturedCall
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.provenance import provenance
from revtrain.sync_batchnorm import synchronize_batchnorm

_WARM_UP = 5
_SMALL = 0.25  # MB of a bucket
_ONE = 1000.0


def alone(net: nn.Module, device: torch.device) -> nn.Module:
    return to_device(net, device)


def ddp(net: nn.Module, device: torch.device, bucket_mb: float | None = None) -> nn.Module:
    ids = None if device.type == "cpu" else [device.index]
    net = to_device(net, device)
    return DistributedDataParallel(net, device_ids=ids, bucket_cap_mb=bucket_mb)


def ddp_synchronized(net: nn.Module, device: torch.device) -> nn.Module:
    return ddp(synchronize_batchnorm(net, device), device)


def fsdp(net: nn.Module, device: torch.device, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - seconds
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    # Not `to_device`: sharded parameters must be contiguous, so weights are not channels_last.
    net = net.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in list(net.modules()):
        if isinstance(module, kinds) and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


Share = Callable[[nn.Module, torch.device], nn.Module]
ON_ONE: dict[str, Share] = {"one process": alone, "one process, CUDA graph": alone}
ON_SEVERAL: dict[str, Share] = {
    "DDP, synchronized BatchNorm (revtrain)": ddp_synchronized,
    "DDP": ddp,
    "DDP, small buckets": lambda net, device: ddp(net, device, _SMALL),
    "DDP, one bucket": lambda net, device: ddp(net, device, _ONE),
    "DDP, no exchange": ddp,
    "FSDP2, each block": lambda net, device: fsdp(net, device, (AdditiveCoupling, ResidualBlock)),
    "FSDP2, each stage": lambda net, device: fsdp(net, device, (ReversibleStage,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--blocks", type=int, nargs="+")
    parser.add_argument("--channels", type=int, nargs="+")
    parser.add_argument("--batch-size", type=int, required=True, help="of one process")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--seconds", type=float, required=True, help="no way is begun later")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    deadline = time.perf_counter() + chosen.seconds
    accelerator = make_accelerator(cpu=chosen.cpu, mixed_precision=chosen.precision)
    ways = ON_SEVERAL if accelerator.num_processes > 1 else ON_ONE
    record: dict[str, Any] = {**provenance(accelerator), "rows": [], "readiness": []}
    for model in chosen.models:
        spec = NetSpec.of(model, 10, 3, chosen.blocks, chosen.channels)
        for way, share in ways.items():
            for reversing in (True, False):
                if "graph" in way and accelerator.device.type != "cuda":
                    continue
                row = {"model": model, "way": way, "reversing": reversing}
                row |= attempt(
                    lambda: measure(spec, way, share, chosen, accelerator, reversing=reversing),  # noqa: B023
                    deadline,
                )
                record["rows"].append(row)
                save(record, chosen.output, accelerator)
        if accelerator.num_processes > 1:
            for reversing in (True, False):
                row = {"model": model, "reversing": reversing}
                row |= attempt(
                    lambda: readiness(spec, reversing, chosen, accelerator),  # noqa: B023
                    deadline,
                )
                record["readiness"].append(row)
                save(record, chosen.output, accelerator)


def save(record: dict[str, Any], output: Path, accelerator: Accelerator) -> None:
    """After each row: who is stopped loses nothing."""
    if accelerator.is_main_process:
        write_json(output, record)
        print(record["rows"][-1], flush=True)


def attempt(function: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """Returns what was measured, or why nothing was; in all processes the same."""
    (late,) = broadcast_object_list([time.perf_counter() > deadline])
    if late:
        return {"error": "no time was left"}
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - the row says what happened, the others go on
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_batch(chosen: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(chosen.batch_size, 3, 32, 32, device=device)
    x = x.contiguous(memory_format=memory_format(device))
    return x, torch.randint(10, (chosen.batch_size,), device=device)


def measure(
    spec: NetSpec,
    way: str,
    share: Share,
    chosen: argparse.Namespace,
    accelerator: Accelerator,
    *,
    reversing: bool,
) -> dict[str, Any]:
    """Times steps; returns images per second over all processes, and the memory of each."""
    device = accelerator.device
    x, labels = make_batch(chosen, device)
    torch.manual_seed(0)
    model = share(spec.build(reversing=reversing), device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        quiet = isinstance(model, DistributedDataParallel) and "no exchange" in way
        with model.no_sync() if quiet else nullcontext():
            with accelerator.autocast():
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    call = CapturedCall(step, device, enabled="graph" in way)
    for _ in range(_WARM_UP):
        call(x, labels)
    if "graph" in way and not call.captured:
        raise RuntimeError(f"no graph: {call.why_not}")
    before = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    accelerator.wait_for_everyone()
    marks = [mark(device)]
    for _ in range(chosen.steps):
        call(x, labels)
        marks.append(mark(device))
    times = [milliseconds(a, b) for a, b in pairwise(marks)]
    slowest = max(gather_object([statistics.median(times)]))
    peak = None
    if device.type == "cuda":
        peak = max(torch.cuda.max_memory_allocated(device), call.peak_bytes)
    return {
        "step_ms": slowest,
        "images_per_second": 1e3 * chosen.batch_size * accelerator.num_processes / slowest,
        # Weights, momenta and the batch; these and all of a step.
        "kept_bytes_of_ranks": gather_object([before]),
        "peak_bytes_of_ranks": gather_object([peak]),
    }


def readiness(
    spec: NetSpec, reversing: bool, chosen: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Tells when in the backward pass each small bucket is ready to be summed: from 0 to 1."""
    device = accelerator.device
    x, labels = make_batch(chosen, device)
    torch.manual_seed(0)
    model = ddp(spec.build(reversing=reversing), device, _SMALL)
    ready: list[tuple[int, Any]] = []

    # Without annotations: here they would be strings, which DDP takes for wrong types.
    def hook(_, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        ready.append((bucket.buffer().nbytes, mark(device)))
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, hook)
    for _ in range(_WARM_UP):  # buckets are ordered anew after the first pass
        with accelerator.autocast():
            loss = F.cross_entropy(model(x), labels)
        ready.clear()
        begin = mark(device)
        loss.backward()
        end = mark(device)
        model.zero_grad()
    whole = milliseconds(begin, end)
    return {
        "backward_ms": whole,
        "bucket_bytes": [size for size, _ in ready],
        "ready_at": [round(milliseconds(begin, moment) / whole, 3) for _, moment in ready],
    }


def mark(device: torch.device) -> Any:
    """A moment: of the device where it has a clock of its own."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return 1e3 * float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end))


if __name__ == "__main__":
    main()
