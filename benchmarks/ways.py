"""The ways to train one RevNet that are compared: ours, other libraries, torch's checkpointing.

All ways run the same branches with the same initial weights, inside of the same stem, transitions
and head; what differs is the container that runs a stage's blocks. Other libraries run torch's
BatchNorm and autocast, as their users do; revmodels' kernels are for the ways that say so, in a
CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revcore
from revmodels.revnet import ReversibleStage
from revtrain.net import NetSpec

Pair = tuple[nn.Module, nn.Module]
Chain = Callable[[Sequence[Pair]], nn.Module]


class PlainBlock(nn.Module):
    """An additive coupling without a library."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + self.f(b)
        return a, b + self.g(a)


class Checkpointed(nn.Module):
    """Plain blocks, of which segments are recomputed by torch.utils.checkpoint."""

    def __init__(self, pairs: Sequence[Pair], segment: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(f, g) for f, g in pairs)
        self.segment = segment

    def forward(self, x: Tensor) -> Tensor:
        streams = x.chunk(2, 1)
        for start in range(0, len(self.blocks), self.segment):
            part = partial(_run, self.blocks[start : start + self.segment])
            streams = checkpoint(part, *streams, use_reentrant=False, preserve_rng_state=False)
        return torch.cat(streams, 1)


def _run(blocks: nn.ModuleList, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for block in blocks:
        a, b = block(a, b)
    return a, b


def by_block(pairs: Sequence[Pair]) -> nn.Module:
    return Checkpointed(pairs, 1)


def by_sqrt(pairs: Sequence[Pair]) -> nn.Module:
    return Checkpointed(pairs, max(1, math.isqrt(len(pairs))))


class PlainBatchNorm2d(nn.BatchNorm2d):
    """What revmodels' kernels do not know, so that torch's run."""


class PlainConv2d(nn.Conv2d):
    """What revtrain does not cast ahead: other libraries repeat branches without autocast."""


PLAIN = {nn.BatchNorm2d: PlainBatchNorm2d, nn.Conv2d: PlainConv2d}


class Copy(nn.Module):
    """Gives MemCNN an input of its own, whose storage it may free: the ReLU before needs its own.

    Without it a net whose stem leads into the chain stops in its first backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def by_memcnn(pairs: Sequence[Pair]) -> nn.Module:
    import memcnn  # noqa: PLC0415 - it may not be there

    wrap = partial(memcnn.InvertibleModuleWrapper, keep_input=False, preserve_rng_state=False)
    return nn.Sequential(Copy(), *(wrap(memcnn.AdditiveCoupling(f, g)) for f, g in pairs))


def by_revtorch(pairs: Sequence[Pair]) -> nn.Module:
    import revtorch  # noqa: PLC0415 - it may not be there

    blocks = (revtorch.ReversibleBlock(f, g, split_along_dim=1) for f, g in pairs)
    return revtorch.ReversibleSequence(nn.ModuleList(blocks))


def by_revlib(pairs: Sequence[Pair]) -> nn.Module:
    import revlib  # noqa: PLC0415 - it may not be there

    return revlib.ReversibleSequential(*(branch for pair in pairs for branch in pair))


def without_overlap(pairs: Sequence[Pair]) -> nn.Module:
    chain = revcore.ReversibleSequential(*(revcore.AdditiveCoupling(f, g) for f, g in pairs))
    chain.overlap = False
    return chain


def by_fixed_point(pairs: Sequence[Pair]) -> nn.Module:
    return revcore.ReversibleSequential(*(revcore.FixedPointCoupling(f, g) for f, g in pairs))


@dataclass(frozen=True)
class Way:
    """How to run the chains of a net.

    Attributes:
        chain: Makes a container from pairs of branches; None for revmodels' own.
        reversing: Whether a container of revcore reverses.
        package: The library that has to be there.
        tuned: Whether BatchNorm and ReLU run in revmodels' kernels, where there are any, and the
            weights of convolutions are cast at once.
        compiled: Whether the whole net is compiled.
        budget: Share of the activations that the compiler may keep.
        recompute: Whether what is not reversible is recomputed.
    """

    chain: Chain | None = None
    reversing: bool = True
    package: str | None = None
    tuned: bool = True
    compiled: bool = False
    budget: float | None = None
    recompute: bool = False

    @property
    def absent(self) -> str | None:
        """Says which package is missing, if one is."""
        if self.package is not None and version_of(self.package) is None:
            return f"{self.package} is not installed"
        return None

    def build(self, spec: NetSpec, seed: int = 0) -> nn.Module:
        """Makes the network; equal seeds give equal weights for all ways."""
        torch.manual_seed(seed)
        net = spec.build(reversing=self.reversing)
        net.recompute = self.recompute  # type: ignore[assignment]
        if not self.tuned:
            for module in net.modules():
                module.__class__ = PLAIN.get(type(module), type(module))
        if self.chain is not None:
            for stage in net.modules():
                if isinstance(stage, ReversibleStage) and len(stage.chain):
                    stage.chain = self.chain([(block.f, block.g) for block in stage.chain])
        if self.compiled:
            # The method, because Accelerate wraps autocast around it.
            net.forward = torch.compile(_of_its_own(net.forward))  # type: ignore[method-assign]
        return net

    def compiling(self) -> AbstractContextManager[Any]:
        """Returns what all has to run in that may compile."""
        if self.budget is None:
            return nullcontext()
        from torch._functorch import config  # noqa: PLC0415 - private, so only where needed

        return config.patch(activation_memory_budget=self.budget)


def _of_its_own(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps a forward pass in code that no other one has.

    What is compiled belongs to a piece of code, so that two nets of one structure share it, also if
    the second one has another budget.
    """

    def own(x: Tensor) -> Tensor:
        return forward(x)

    own.__code__ = own.__code__.replace()
    return own


WAYS = {
    "stored": Way(reversing=False),
    "revcore": Way(),
    "revcore, no overlap": Way(without_overlap),
    "revcore, recomputed": Way(recompute=True),
    "revcore, recomputed, no overlap": Way(without_overlap, recompute=True),
    "revcore, fixed point": Way(by_fixed_point),
    "MemCNN": Way(by_memcnn, package="memcnn", tuned=False),
    "RevTorch": Way(by_revtorch, package="revtorch", tuned=False),
    "RevLib": Way(by_revlib, package="revlib", tuned=False),
    "checkpoint by block": Way(by_block, tuned=False),
    "checkpoint in sqrt segments": Way(by_sqrt, tuned=False),
    "stored, torch's BatchNorm": Way(reversing=False, tuned=False),
    "stored, compiled": Way(reversing=False, compiled=True),
    "revcore, compiled": Way(compiled=True),
    "stored, compiled, budget 0.3": Way(reversing=False, compiled=True, budget=0.3),
    "stored, compiled, budget 0.0": Way(reversing=False, compiled=True, budget=0.0),
}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def block_modes(net: nn.Module) -> dict[str, str]:
    """Tells of each block whether it is reversed, stored, or reversed with its input kept."""
    modes = {}
    for name, stage in net.named_modules():
        if not isinstance(stage, ReversibleStage):
            continue
        if not isinstance(stage.transition, nn.Identity):
            modes[f"{name}.transition"] = "recomputed" if net.recompute else "stored"
        chain = stage.chain
        if not isinstance(chain, revcore.ReversibleSequential):
            modes[f"{name}.chain"] = f"by {type(chain).__module__}.{type(chain).__name__}"
            continue
        for position, block in enumerate(chain):
            kept = ", input kept" if getattr(block, "keep_input", False) else ""
            modes[f"{name}.chain.{position}"] = ("reversed" if chain.reversing else "stored") + kept
    return modes
