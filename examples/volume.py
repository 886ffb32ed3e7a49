"""A 3-D net: segment balls in noisy volumes.

    python examples/volume.py

Volumes are where activations hurt most: one map of 16 channels over 32x32x32 voxels takes 2 MiB.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revcore import ReversibleBlock, ReversibleSequential, set_reversing, track_memory

SIZE, CHANNELS, BLOCKS, STEPS = 32, 16, 6, 10


def volumes(count: int) -> tuple[Tensor, Tensor]:
    """Makes volumes `(count, 1, SIZE, SIZE, SIZE)` of noise with a ball each, and the balls."""
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centers = torch.rand(count, 3, 1, 1, 1) - 0.5
    radii = 0.3 + 0.3 * torch.rand(count, 1, 1, 1)
    balls = ((grid - centers).square().sum(1) < radii.square()).float()[:, None]
    return balls + 0.7 * torch.randn_like(balls), balls


def branch() -> nn.Module:
    half = CHANNELS // 2
    return nn.Sequential(
        nn.GroupNorm(1, half), nn.ReLU(inplace=True), nn.Conv3d(half, half, 3, padding=1)
    )


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, CHANNELS, 3, padding=1),
        ReversibleSequential(*(ReversibleBlock(branch(), branch()) for _ in range(BLOCKS))),
        nn.Conv3d(CHANNELS, 1, 1),
    )


def train(*, reversing: bool) -> tuple[list[float], float, float]:
    torch.manual_seed(0)
    net = set_reversing(build(), reversing)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    started = time.perf_counter()
    for _ in range(STEPS):
        x, balls = volumes(2)
        loss = F.binary_cross_entropy_with_logits(net(x), balls)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = (time.perf_counter() - started) / STEPS
    with track_memory() as memory:
        output = net(volumes(2)[0])
        kept = memory.live_bytes
    assert output.requires_grad
    return losses, kept / 2**20, seconds


def main() -> None:
    ours, kept, seconds = train(reversing=True)
    plain, kept_stored, seconds_stored = train(reversing=False)
    print(f"kept after forward: {kept:.1f} MiB reversed, {kept_stored:.1f} MiB stored")
    print(f"a step: {seconds:.2f} s reversed, {seconds_stored:.2f} s stored")
    print(f"loss: {ours[0]:.4f} to {ours[-1]:.4f} reversed, to {plain[-1]:.4f} stored")
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 1e-3
    assert kept < kept_stored / 4


if __name__ == "__main__":
    main()
