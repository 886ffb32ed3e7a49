"""What else could be done: storing, checkpointing and reversing the same blocks.

    python benchmarks/alternatives.py --output FILE.json

All ways run one chain of blocks on the same images, in turns within one run: time is the median of
a step, forward and backward; memory is what a forward pass leaves behind, and the most at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from revcore import AdditiveCoupling, ReversibleSequential, set_reversing, track_memory
from revtrain.files import write_json
from revtrain.provenance import provenance

Net = Callable[[Tensor], Tensor]


def branch(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )


def ways(chain: ReversibleSequential) -> dict[str, Net]:
    stored = nn.Sequential(*chain)  # couplings by themselves store their activations
    segments = max(1, round(len(chain) ** 0.5))

    def reversed_chain(x: Tensor) -> Tensor:
        return set_reversing(chain, True)(x)  # type: ignore[no-any-return]

    def by_block(x: Tensor) -> Tensor:
        for block in stored:
            x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
        return x

    def by_segment(x: Tensor) -> Tensor:
        return checkpoint_sequential(stored, segments, x, use_reentrant=False)  # type: ignore[no-any-return]

    return {
        "stored": stored,
        "reversed": reversed_chain,
        "checkpoint, every block": by_block,
        "checkpoint, segments": by_segment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=arguments.cpu)
    torch.manual_seed(0)
    half = arguments.channels // 2
    couplings = (AdditiveCoupling(branch(half), branch(half)) for _ in range(arguments.blocks))
    nets = ways(ReversibleSequential(*couplings).to(accelerator.device))
    size = (arguments.batch_size, arguments.channels, arguments.image_size, arguments.image_size)
    x = torch.randn(size, device=accelerator.device, requires_grad=True)

    seconds: dict[str, list[float]] = {way: [] for way in nets}
    for _ in range(arguments.rounds):
        for way, net in nets.items():
            seconds[way].append(timed(net, x))
    rows = {
        way: memory_of(net, x) | {"step_seconds": statistics.median(seconds[way])}
        for way, net in nets.items()
    }
    record = {"blocks": arguments.blocks, "batch": list(size), "ways": rows}
    write_json(arguments.output, record | provenance(accelerator))


def timed(net: Net, x: Tensor) -> float:
    synchronize(x)
    started = time.perf_counter()
    net(x).square().mean().backward()
    synchronize(x)
    return time.perf_counter() - started


def memory_of(net: Net, x: Tensor) -> dict[str, float]:
    with track_memory() as memory:
        loss = net(x).square().mean()
        kept = memory.live_bytes
        loss.backward()
    return {"activation_bytes": kept, "peak_bytes": memory.peak_bytes}


def synchronize(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)


if __name__ == "__main__":
    main()
