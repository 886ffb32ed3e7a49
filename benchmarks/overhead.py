"""What does reversing cost where arithmetic costs nothing, beside RevTorch and RevLib?

Usage: `python benchmarks/overhead.py --output FILE.json`, with revtorch and revlib installed.

Branches are so small that all time is that of Python and of starting operations. All ways run the
same branches, in turns within one run, in rounds of a few steps; the numbers are medians over all
but the first of each round, in microseconds for one branch, forward and backward.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import revlib
import revtorch
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import revcore
from revtrain.files import write_json
from revtrain.provenance import provenance

Pairs = Sequence[tuple[nn.Module, nn.Module]]
Net = Callable[[Tensor], Tensor]
_STEPS_PER_ROUND = 6


def linear(width: int) -> nn.Module:
    return nn.Linear(width, width)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def norm(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))


def attention(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.1))


class Own(nn.Module):
    """The branch of `norm` as a module of one's own, of which nothing is known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).relu())


@revcore.self_contained
class Declared(Own):
    """The same, of which it is said that it uses nothing from elsewhere."""


BRANCHES = {
    "linear": linear,
    "mlp": mlp,
    "batch norm": norm,
    "dropout": attention,
    "own class": Own,
    "own class, declared": Declared,
}


def plain(pairs: Pairs) -> Net:
    def forward(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        for f, g in pairs:
            a = a + f(b)
            b = b + g(a)
        return torch.cat((a, b), 1)

    return forward


def ours(pairs: Pairs) -> Net:
    return revcore.ReversibleSequential(*(revcore.ReversibleBlock(f, g) for f, g in pairs))


def by_revtorch(pairs: Pairs) -> Net:
    # Without the same seed in both runs of a branch its gradients are wrong where there is dropout.
    draws = any(isinstance(module, nn.Dropout) for f, _ in pairs for module in f.modules())
    blocks = nn.ModuleList(
        revtorch.ReversibleBlock(f, g, split_along_dim=1, fix_random_seed=draws) for f, g in pairs
    )
    net: Net = revtorch.ReversibleSequence(blocks)
    return net


def by_revlib(pairs: Pairs) -> Net:
    net: Net = revlib.ReversibleSequential(*(branch for pair in pairs for branch in pair))
    return net


WAYS = {"plain": plain, "revcore": ours, "RevTorch": by_revtorch, "RevLib": by_revlib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4, help="of a stream")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=arguments.cpu)
    rows = {}
    for name, branch in BRANCHES.items():
        pairs = [
            (branch(arguments.width), branch(arguments.width)) for _ in range(arguments.blocks)
        ]
        microseconds = measure(pairs, arguments.width, arguments.rounds, accelerator.device)
        rows[name] = microseconds
        print(f"{name:12}", {way: round(value, 1) for way, value in microseconds.items()})
    if arguments.output:
        record = {"blocks": arguments.blocks, "width": arguments.width, "microseconds": rows}
        write_json(arguments.output, record | provenance(accelerator))


def measure(pairs: Pairs, width: int, rounds: int, device: torch.device) -> dict[str, float]:
    nets, times = {}, {}
    for way, build in WAYS.items():
        own = [tuple(copy.deepcopy(branch).to(device) for branch in pair) for pair in pairs]
        nets[way] = build(own)  # type: ignore[arg-type]
        if isinstance(nets[way], nn.Module):
            nets[way].to(device)  # type: ignore[attr-defined]
        times[way] = []
    x = torch.randn(2, 2 * width, device=device, requires_grad=True)
    for _ in range(rounds):
        for way, net in nets.items():
            for step in range(_STEPS_PER_ROUND):
                synchronize(device)
                started = time.perf_counter()
                net(x).sum().backward()
                synchronize(device)
                # The first finds the caches of the processor full of the others.
                if step > 0:
                    times[way].append(time.perf_counter() - started)
    scale = 1e6 / (2 * len(pairs))
    return {way: statistics.median(seconds) * scale for way, seconds in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    main()
