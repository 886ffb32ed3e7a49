"""A normalizing flow with its log-determinant, on two moons.

    python examples/flow.py

The flow maps data to noise; its density needs log |det J|, the sum of the logarithms of all scales.
A third stream gathers it, by an additive half-step before each affine one: all of the chain, the
log-determinant too, is reconstructed in the backward pass.
"""

import math

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from revcore import (
    AdditiveCoupling,
    AffineCoupling,
    HalfStep,
    ReversibleSequential,
    bounded_adapter,
    set_reversing,
    track_memory,
)

BLOCKS, STEPS = 6, 300


class LogDet(nn.Module):
    """What a branch adds to the log-determinant of each sample."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        scale, _ = bounded_adapter(self.branch(x))
        return scale.log().sum(1)


class FlowCoupling(AffineCoupling):
    """An affine coupling of streams 0 and 1 that adds to stream 2 the logarithms of its scales."""

    streams = 3

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__(f, g, adapter=bounded_adapter)
        self.adding = AdditiveCoupling(LogDet(f), LogDet(g))

    def half_steps(self) -> list[HalfStep]:
        # The price: each branch runs twice, once for the logarithms.
        return [
            HalfStep(self.adding, self.adding.f, target=2, source=1),
            HalfStep(self, self.f, target=0, source=1),
            HalfStep(self.adding, self.adding.g, target=2, source=0),
            HalfStep(self, self.g, target=1, source=0),
        ]


def branch() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    )


def log_density(flow: ReversibleSequential, x: Tensor) -> Tensor:
    z1, z2, log_det = flow(*x.split(1, 1), x.new_zeros(len(x)))
    return log_det - (z1.square() + z2.square())[:, 0] / 2 - math.log(2 * math.pi)


def train(*, reversing: bool) -> tuple[ReversibleSequential, list[float], float]:
    torch.manual_seed(0)
    points, _ = make_moons(2000, noise=0.05, random_state=0)
    x = torch.tensor(points, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    flow = ReversibleSequential(*(FlowCoupling(branch(), branch()) for _ in range(BLOCKS)))
    set_reversing(flow, reversing)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    losses = []
    for _ in range(STEPS):
        loss = -log_density(flow, x[torch.randint(len(x), (256,))]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with track_memory() as memory:
        output = log_density(flow, x[:256])
        kept = memory.live_bytes
    assert output.requires_grad
    return flow, losses, kept / 2**10


def check_log_det(flow: ReversibleSequential) -> float:
    """Compares the third stream with the determinant that autograd finds."""
    flow = flow.double()
    x = torch.randn(2, dtype=torch.float64)

    def whole(x: Tensor) -> Tensor:
        return torch.cat(flow(*x.view(1, 2).split(1, 1), x.new_zeros(1))[:2]).flatten()

    exact = torch.autograd.functional.jacobian(whole, x).det().abs().log()
    ours = flow(*x.view(1, 2).split(1, 1), x.new_zeros(1))[2]
    return (ours - exact).abs().item()


def main() -> None:
    flow, ours, kept = train(reversing=True)
    _, plain, kept_stored = train(reversing=False)
    print(f"kept after forward: {kept:.0f} KiB reversed, {kept_stored:.0f} KiB stored")
    print(f"nats: {ours[0]:.3f} to {ours[-1]:.3f} reversed, to {plain[-1]:.3f} stored")
    print(f"error of the log-determinant in float64: {check_log_det(flow):.1e}")
    with torch.no_grad():
        z = torch.randn(2, 1000, 1, dtype=torch.float64)
        x1, x2, _ = flow.inverse(*z, torch.zeros(1000, dtype=torch.float64))
    print(f"1000 samples have deviations {x1.std():.2f} and {x2.std():.2f}; the data have 1")
    assert check_log_det(flow) < 1e-9
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(a - b) for a, b in zip(ours[:50], plain[:50], strict=True)) < 1e-2
    assert kept < kept_stored / 4


if __name__ == "__main__":
    main()
