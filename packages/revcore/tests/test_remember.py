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


@pytest.mark.parametrize("reversing", [True, False])
def test_no_gradient_of_what_was_there_before(reversing: bool) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            y, gate = revcore.remember(lambda: (x, self.gate))
            return x.tanh() * y * gate

    block = revcore.ReversibleBlock(Gate(), nn.Identity()).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    revcore.set_reversing(block, reversing)(x).sum().backward()
    b = x[:, 3:].detach()
    of_branch = (1 - b.tanh().square()) * b * block.coupling.f.gate.detach()
    torch.testing.assert_close(x.grad, torch.cat((2 + 0 * b, 1 + 2 * of_branch), 1))
    assert all(parameter.grad is None for parameter in block.parameters())


@pytest.mark.parametrize("found", [torch.ones(3), None, (1.0,)])
@pytest.mark.parametrize("reversing", [True, False])
def test_what_is_no_tuple_of_tensors(found: Any, reversing: bool) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * len(revcore.remember(lambda: found))

    block = revcore.set_reversing(revcore.ReversibleBlock(Wrong()), reversing)
    with pytest.raises(TypeError, match="must return a tuple of tensors"):
        block(torch.randn(5, 6, requires_grad=True))


def test_a_result_that_is_changed_in_place() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            (scale,) = revcore.remember(lambda: (x.abs().amax(0),))
            return x * scale.mul_(2)

    y = revcore.ReversibleBlock(Doubled())(torch.randn(5, 6, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"remember returned was changed in place"):
        y.sum().backward()
