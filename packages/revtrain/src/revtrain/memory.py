"""Activation memory and time of one training step, over depth, reversing and stored."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import revcore
from revmodels import RevNet
from revtrain.files import read_json
from revtrain.net import NetSpec, to_device

DEPTHS = (1, 2, 4, 8, 16)

_ROUNDS = 10
_SECONDS_PER_DEPTH = 4.0


@dataclass(frozen=True)
class StepCost:
    """What one step costs.

    Attributes:
        activation_bytes: Bytes that the forward pass leaves behind for the backward pass.
        peak_bytes: The most bytes alive at once in forward and backward pass. Neither counts the
            parameters, their gradients or the batch itself.
        step_seconds: Median time of forward pass, loss and backward pass.
    """

    activation_bytes: int
    peak_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class DepthCost:
    """The same network at one depth, both ways.

    Attributes:
        blocks: Blocks in each stage.
        layers: Layers with weights along the longest path.
        parameters: Number of parameters.
        reversing: Cost when activations are reconstructed.
        stored: Cost when activations are stored, as plain autograd does.
    """

    blocks: int
    layers: int
    parameters: int
    reversing: StepCost
    stored: StepCost


def compare_memory(
    spec: NetSpec,
    x: Tensor,
    labels: Tensor,
    accelerator: Accelerator,
    depths: Sequence[int] = DEPTHS,
    *,
    recompute: bool = False,
) -> list[DepthCost]:
    """Measures a reversible network at several depths.

    The two ways are switched in one network by `revcore.set_reversing`, and timed in turns, so
    that both see the same weights and the same moods of the machine.

    Args:
        spec: The network; its own number of blocks is replaced by each depth.
        x: A batch of images (N, C, H, W), on the accelerator's device.
        labels: Its labels, int64 (N,).
        accelerator: Gives device and precision.
        depths: Numbers of blocks in each stage.
        recompute: Whether the reversing network recomputes what it cannot reverse.

    Returns:
        One entry for each depth.

    Raises:
        ValueError: The network is not reversible.

    Example:
        >>> spec = NetSpec.of("revnet38", num_classes=10, in_channels=1, channels=(4, 4, 8, 8))
        >>> x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
        >>> two, four = compare_memory(spec, x, labels, Accelerator(cpu=True), depths=(2, 4))
        >>> two.reversing.activation_bytes == four.reversing.activation_bytes
        True
        >>> two.stored.activation_bytes < four.stored.activation_bytes
        True
    """
    if not spec.architecture.reversible:
        raise ValueError(f"model (={spec.model!r}) is not reversible: there is nothing to compare")
    return [
        _cost(replace(spec, blocks=(depth,) * len(spec.blocks)), x, labels, accelerator, recompute)
        for depth in depths
    ]


def _cost(
    spec: NetSpec, x: Tensor, labels: Tensor, accelerator: Accelerator, recompute: bool
) -> DepthCost:
    net = to_device(spec.build(), x.device)
    assert isinstance(net, RevNet)

    def switch(reversing: bool) -> None:
        revcore.set_reversing(net, reversing)
        net.recompute = recompute and reversing

    bytes_: dict[bool, tuple[int, int]] = {}
    times: dict[bool, list[float]] = {True: [], False: []}
    for reversing in times:
        switch(reversing)
        bytes_[reversing] = activation_bytes(net, x, labels, accelerator)
    deadline = time.perf_counter() + _SECONDS_PER_DEPTH
    for _ in range(_ROUNDS):
        for reversing, seconds in times.items():
            switch(reversing)
            _wait_for(x.device)
            started = time.perf_counter()
            _step(net, x, labels, accelerator)
            _wait_for(x.device)
            seconds.append(time.perf_counter() - started)
        if time.perf_counter() > deadline:
            break
    ours, plain = (
        StepCost(*bytes_[mode], statistics.median(times[mode])) for mode in (True, False)
    )
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return DepthCost(
        spec.blocks[0], spec.architecture.layers, parameters, reversing=ours, stored=plain
    )


def _loss(net: nn.Module, x: Tensor, labels: Tensor, accelerator: Accelerator) -> Tensor:
    with accelerator.autocast():
        logits = net(x)
    return F.cross_entropy(logits.float(), labels)


def _step(net: nn.Module, x: Tensor, labels: Tensor, accelerator: Accelerator) -> None:
    _loss(net, x, labels, accelerator).backward()


def activation_bytes(
    net: nn.Module, x: Tensor, labels: Tensor, accelerator: Accelerator
) -> tuple[int, int]:
    """Measures one step: the bytes that its forward pass leaves behind, and the most alive at once.

    Neither counts the parameters, their gradients or the batch. Gradients are added to.
    """
    # The first step allocates the gradients, which are no activations.
    _step(net, x, labels, accelerator)
    with revcore.track_memory() as memory:
        loss = _loss(net, x, labels, accelerator)
        after_forward = memory.live_bytes
        loss.backward()
    return after_forward, memory.peak_bytes


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_json(
    spec: NetSpec, x: Tensor, costs: Sequence[DepthCost], *, recompute: bool = False
) -> dict[str, Any]:
    """Returns what `memory.json` holds."""
    return {
        "model": spec.model,
        "channels": spec.channels,
        "recompute": recompute,
        "batch": list(x.shape),
        "depths": [asdict(cost) for cost in costs],
    }


def read_memory(path: Path) -> list[DepthCost]:
    """Reads what `memory_json` returned; nothing if nothing was measured.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.exists():
        return []
    return [
        DepthCost(
            **{
                **depth,
                "reversing": StepCost(**depth["reversing"]),
                "stored": StepCost(**depth["stored"]),
            }
        )
        for depth in read_json(path)["depths"]
    ]
