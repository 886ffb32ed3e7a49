"""How large are the errors of reconstructed activations, and what do they do to gradients?

Usage: `python benchmarks/numerics.py --output FILE.json`; runs on the CPU.

For each scheme, precision and depth, one training step of a chain of residual branches. The errors
are relative: of the reconstructed stream that is off most, and of the gradients of all parameters
together, reversed and stored, against float64 with stored activations. Each is the median over the
seeds, which draw the weights and the images; null where it is not a number.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import revcore
from revtrain.files import write_json
from revtrain.provenance import provenance

CHANNELS, SIZE, BATCH = 16, 8, 16
ANCHOR = 8


class Way(NamedTuple):
    """A scheme in a precision.

    Attributes:
        coupling: Name of the scheme.
        streams: Precision of the streams.
        branches: Precision in which branches compute.
        gain: What the output of each branch is multiplied by.
        anchors: Whether every eighth block keeps its input.
        clamp: Bound of the log-scale of the affine scheme.
    """

    coupling: str
    streams: torch.dtype
    branches: torch.dtype
    gain: float = 1.0
    anchors: bool = False
    clamp: float = 2.0


FLOAT, HALF = torch.float32, torch.bfloat16
WAYS = {
    "additive, float32": Way("additive", FLOAT, FLOAT),
    "additive, float32, bf16 branches": Way("additive", FLOAT, HALF),
    "additive, float32, bf16 branches, anchors": Way("additive", FLOAT, HALF, anchors=True),
    "additive, bf16": Way("additive", HALF, HALF),
    "affine, float32": Way("affine", FLOAT, FLOAT),
    "affine, float32, anchors": Way("affine", FLOAT, FLOAT, anchors=True),
    "affine, float32, clamp 0.5": Way("affine", FLOAT, FLOAT, clamp=0.5),
    "affine, float32, bf16 branches": Way("affine", FLOAT, HALF),
    "affine, bf16": Way("affine", HALF, HALF),
    "fixed point, float32": Way("fixed point", FLOAT, FLOAT),
    "fixed point, bf16 branches": Way("fixed point", FLOAT, HALF),
    "additive, float32, branches x4": Way("additive", FLOAT, FLOAT, gain=4.0),
    "affine, float32, branches x4": Way("affine", FLOAT, FLOAT, gain=4.0),
}


class Gain(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def branch(way: Way) -> nn.Module:
    """Returns a residual branch of a RevNet: normalization, ReLU, convolution, twice."""
    out = 2 * CHANNELS if way.coupling == "affine" else CHANNELS
    return nn.Sequential(
        *(nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
        *(nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, out, 3, padding=1)),
        Gain(way.gain),
    )


def chain(way: Way, depth: int) -> revcore.ReversibleSequential:
    adapter = partial(revcore.bounded_adapter, clamp=way.clamp)
    coupling = {
        "additive": revcore.AdditiveCoupling,
        "affine": partial(revcore.AffineCoupling, adapter=adapter),
        "fixed point": revcore.FixedPointCoupling,
    }[way.coupling]
    blocks = [revcore.ReversibleBlock(branch(way), branch(way), coupling) for _ in range(depth)]
    for number, block in enumerate(blocks):
        block.keep_input = way.anchors and number % ANCHOR == 0
    return revcore.ReversibleSequential(*blocks)


def gradients(net: nn.Module, x: Tensor, casts: AbstractContextManager[Any]) -> list[Tensor]:
    # A weighted sum of all outputs is a loss whose gradient is small nowhere.
    with casts:
        y = net(x)
    loss = (y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return [g.double() for g in torch.autograd.grad(loss, list(net.parameters()))]


def relative(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, true, strict=True))
    return (difference / sum(float(b.square().sum()) for b in true)) ** 0.5


def measure(way: Way, depth: int, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    net = chain(way, depth)
    x = torch.randn(BATCH, 2 * CHANNELS, SIZE, SIZE).to(way.streams)
    true_net = revcore.set_reversing(copy.deepcopy(net).double(), False)
    truth = gradients(true_net, x.double(), nullcontext())
    net.to(way.streams)

    def casts() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", way.branches, enabled=way.branches is not way.streams)

    with revcore.track_drift() as drift:
        reversed_ = gradients(net, x, casts())
    stored = gradients(revcore.set_reversing(net, False), x, casts())
    return {
        "stream": drift.worst(net).error,
        "gradient_reversed": relative(reversed_, truth),
        "gradient_stored": relative(stored, truth),
    }


def median(values: list[float]) -> float | None:
    return statistics.median(values) if all(map(math.isfinite, values)) else None


def rows(depths: Sequence[int], seeds: int) -> Iterator[dict[str, Any]]:
    for name, way in WAYS.items():
        for depth in depths:
            found = [measure(way, depth, seed) for seed in range(seeds)]
            medians = {key: median([one[key] for one in found]) for key in found[0]}
            row = {"way": name, "depth": depth, **medians}
            print(row, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64, 128])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not arguments.output.parent.is_dir():
        parser.error(f"--output (={arguments.output}) is in a folder that does not exist")
    record = {
        "batch": [BATCH, 2 * CHANNELS, SIZE, SIZE],
        "anchor_every": ANCHOR,
        "seeds": arguments.seeds,
        "rows": list(rows(arguments.depths, arguments.seeds)),
    }
    write_json(arguments.output, record | provenance(Accelerator(cpu=True)))


if __name__ == "__main__":
    main()
