"""A normalizing flow with its log-determinant, on two moons.

    python examples/flow.py

The flow maps data to noise; its density needs log |det J|. A chain with `log_det=True` returns it,
of couplings by themselves and of other invertible modules by their method `log_det`. All
activations are reconstructed in the backward pass.
"""

import math

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from revcore import (
    AffineCoupling,
    ReversibleSequential,
    bounded_adapter,
    set_reversing,
    track_memory,
)

BLOCKS, STEPS = 6, 300


class Scale(nn.Module):
    """Scales each feature, as Glow's activation normalization does."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp()

    def log_det(self, x: Tensor) -> Tensor:
        return self.log_scale.sum().expand(len(x))


def branch() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    )


def make_flow() -> ReversibleSequential:
    blocks: list[nn.Module] = []
    for _ in range(BLOCKS):
        blocks += [Scale(2), AffineCoupling(branch(), branch(), adapter=bounded_adapter)]
    return ReversibleSequential(*blocks, log_det=True)


def log_density(flow: ReversibleSequential, x: Tensor) -> Tensor:
    z, log_det = flow(x)
    return log_det - (z.square() + math.log(2 * math.pi)).sum(1) / 2


def train(*, reversing: bool) -> tuple[ReversibleSequential, list[float], float]:
    torch.manual_seed(0)
    points, _ = make_moons(2000, noise=0.05, random_state=0)
    x = torch.tensor(points, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    flow = set_reversing(make_flow(), reversing)
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
    """Compares the log-determinant with that of the Jacobian that autograd finds."""
    x = torch.randn(1, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x).view(2, 2)
    return (flow(x)[1] - jacobian.det().abs().log()).abs().item()


def main() -> None:
    flow, ours, kept = train(reversing=True)
    _, plain, kept_stored = train(reversing=False)
    error = check_log_det(flow.double())
    print(f"kept after forward: {kept:.0f} KiB reversed, {kept_stored:.0f} KiB stored")
    print(f"nats: {ours[0]:.3f} to {ours[-1]:.3f} reversed, to {plain[-1]:.3f} stored")
    print(f"error of the log-determinant in float64: {error:.1e}")
    with torch.no_grad():
        x, _ = flow.inverse(torch.randn(1000, 2, dtype=torch.float64))
    print(f"1000 samples have deviations {x[:, 0].std():.2f} and {x[:, 1].std():.2f}; the data, 1")
    assert error < 1e-9
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(a - b) for a, b in zip(ours[:50], plain[:50], strict=True)) < 1e-2
    assert kept < kept_stored / 4


if __name__ == "__main__":
    main()
