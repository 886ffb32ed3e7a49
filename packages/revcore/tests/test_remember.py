"""What a branch remembers is computed once, wherever the branch stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore

calls = 0


class Scale(torch.autograd.Function):
    """Divides by the largest value of each column, which is held constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        def compute() -> tuple[Tensor]:
            global calls  # noqa: PLW0603
            calls += 1
            return (x.abs().amax(0),)

        (ctx.scale,) = revcore.remember(compute)
        return x / ctx.scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / ctx.scale


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Scale.apply(x)
        return y


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), Normalize(), nn.Tanh(), nn.Linear(3, 3), Normalize())


def nested() -> nn.Module:
    inner = revcore.ReversibleSequential(
        revcore.ReversibleBlock(nn.Sequential(nn.Linear(1, 1), Normalize()), nn.Identity()),
    )
    # An odd width: streams of two and one.
    return nn.Sequential(nn.Linear(3, 2), inner, Normalize(), nn.Linear(2, 3))


@pytest.mark.parametrize(("make", "each"), [(branch, 2), (nested, 2)])
@pytest.mark.parametrize("scheme", ["additive", "affine"])
def test_computed_once(make: Any, each: int, scheme: str, device: torch.device) -> None:
    global calls  # noqa: PLW0603
    torch.manual_seed(0)
    chain = revcore.ReversibleSequential(
        *(revcore.ReversibleBlock(make(), make(), coupling=scheme) for _ in range(3))
    )
    chain.to(device, torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing)
        calls = 0
        wanted = torch.autograd.grad(chain(x).square().sum(), [x, *chain.parameters()])
        assert calls == 6 * each
        found.append(wanted)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_once_with_a_retained_graph() -> None:
    global calls  # noqa: PLW0603
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch(), branch()))
    y = chain(torch.randn(5, 6)).sum()
    calls = 0
    y.backward(retain_graph=True)
    y.backward()
    assert calls == 0


def test_asking_more_often_is_an_error() -> None:
    class More(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                revcore.remember(lambda: (x,))
            return x * 2

    block = revcore.ReversibleBlock(More(), nn.Linear(3, 3))
    y = block(torch.randn(5, 6, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match=r"revcore\.remember more often"):
        y.backward()
