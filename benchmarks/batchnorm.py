"""What do BatchNorm and ReLU cost as two operations, and as one in our kernels?

    python benchmarks/batchnorm.py --output FILE.json

Times one normalization for each shape that it has in a network, as the branches run it: "stream" is
the start of a branch, a float32 stream that becomes what the convolution wants, "inner" is what
follows a convolution, in half precision under autocast. Each is captured in a CUDA graph that goes
over several batches, more than a GPU's cache holds, so that the times are those of the kernels.
`--sweep` also tries other sizes of tiles. Needs CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revmodels import passes, set_fused
from revmodels.batchnorm import batch_norm_relu
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.provenance import provenance

# Channels and side of the image of the normalizations of a branch.
SHAPES = {
    "revnet164": {
        "stream": [(64, 32), (128, 16), (256, 8)],
        "inner": [(16, 32), (32, 16), (64, 8), (128, 32)],
    },
    "revnet38": {"stream": [(16, 32), (32, 16), (56, 8)], "inner": [(16, 32), (32, 16), (56, 8)]},
}
_BYTES = 120e6  # of batches that a graph goes over: more than the cache of an H100
_ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet164", choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--precision", nargs="+", default=["bf16", "no"], choices=["no", "bf16"])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, whose kernels could be timed")
    rows = []
    for precision in arguments.precision:
        for place, shapes in SHAPES[arguments.model].items():
            for channels, side in shapes:
                shape = (arguments.batch_size, channels, side, side)
                row = measure(shape, place, half=precision == "bf16", sweep=arguments.sweep)
                rows.append({"place": place, "precision": precision, **row})
                show(rows[-1])
    record = {
        "question": "What do BatchNorm and ReLU cost?",
        "model": arguments.model,
        "microseconds": rows,
    }
    write_json(
        arguments.output, record | provenance(make_accelerator(cpu=False, mixed_precision="no"))
    )


def measure(shape: tuple[int, ...], place: str, *, half: bool, sweep: bool) -> dict[str, Any]:
    device = torch.device("cuda")
    of_x = torch.bfloat16 if half and place == "inner" else torch.float32
    of_y = torch.bfloat16 if half else torch.float32
    norm = set_fused(nn.BatchNorm2d(shape[1]).to(device), True)
    size = 4 * torch.Size(shape).numel()
    batches = [
        torch.randn(shape, device=device).to(of_x, memory_format=torch.channels_last)
        for _ in range(max(3, round(_BYTES / size)))
    ]
    grad = torch.randn(shape, device=device).to(of_y, memory_format=torch.channels_last)

    def plain(x: Tensor) -> Tensor:
        return F.relu(norm(x), inplace=True).to(of_y)

    def fused(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            return batch_norm_relu(norm, x)

    def repeated(x: Tensor) -> Tensor:
        by = passes.Normalization(mean, inverse, norm.weight, norm.bias)
        return passes.normalize(x, by, relu=True, dtype=of_y)

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x), (x, norm.weight, norm.bias), grad)

        return run

    def times(chosen: Callable[[Tensor], Tensor]) -> dict[str, float]:
        with torch.no_grad():
            forward = in_a_graph(chosen, batches)
        return {
            "forward": forward,
            "forward and backward": in_a_graph(both(chosen), batches),
            "from Python": launched(both(chosen), batches),
        }

    row: dict[str, Any] = {"shape": list(shape)}
    row["plain"], row["fused"] = times(plain), times(fused)
    mean, inverse = passes.statistics(batches[0], norm.eps)
    row["fused"]["repeated"] = in_a_graph(repeated, batches)
    with torch.no_grad():
        row["plain"]["repeated"] = in_a_graph(plain, batches)
    if sweep:
        row["sweep"] = []
        for rows, warps, programs in itertools.product((8, 16, 32), (4, 8), (128, 256, 512)):
            with tiles(ROWS=rows, WARPS=warps, PROGRAMS=programs):
                forward = in_a_graph(fused, batches)
                again = in_a_graph(repeated, batches)
                whole = in_a_graph(both(fused), batches)
            tried = {"rows": rows, "warps": warps, "programs": programs, "forward": forward}
            row["sweep"].append(tried | {"repeated": again, "forward and backward": whole})
    return row


@contextmanager
def tiles(**sizes: int) -> Iterator[None]:
    """Runs the kernels with other tiles."""
    before = {name: getattr(passes, name) for name in sizes}
    for values in (sizes, before):
        for name, value in values.items():
            setattr(passes, name, value)
        passes._lay_out.cache_clear()
        if values is sizes:
            yield


def in_a_graph(function: Callable[[Tensor], Any], batches: list[Tensor]) -> float:
    """Returns microseconds a call, as captured in a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in batches[:2]:
            function(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in batches:
            function(x)
    graph.replay()
    found = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / len(batches))
    return statistics.median(found)


def launched(function: Callable[[Tensor], Any], batches: list[Tensor]) -> float:
    """Returns the microseconds that Python needs for a call, whatever the device does."""
    found = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for x in batches[:10]:
            function(x)
        found.append((time.perf_counter() - start) * 1e6 / len(batches[:10]))
    torch.cuda.synchronize()
    return statistics.median(found)


def show(row: dict[str, Any]) -> None:
    print(row["precision"], row["place"], row["shape"])
    for kind in ("plain", "fused"):
        print(f"  {kind}", {name: round(value, 1) for name, value in row[kind].items()})
    best = sorted(row.get("sweep", []), key=lambda tried: tried["forward and backward"])
    for tried in best[:4]:
        print("   ", {name: round(value, 1) for name, value in tried.items()})


if __name__ == "__main__":
    main()
