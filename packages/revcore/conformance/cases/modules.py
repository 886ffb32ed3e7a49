"""What users put into branches, and what they do with a net in the midst of a step."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import prune

from conformance.adapters import Adapter
from conformance.questions import Observed, question
from conformance.subject import Subject, loss_of, mlp, normed

THEME = "Branches and steps of users"


class _Masked(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner = mlp(width, out)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.inner(x.masked_fill(mask, 0.0))
        return y


@question(THEME)
def boolean_mask(adapter: Adapter, device: torch.device) -> Observed:
    """All branches get a mask of booleans by keyword."""
    subject = Subject(adapter, device, _Masked)
    mask = torch.tensor([False, True, False, False], device=device)
    y = subject(mask=mask)
    loss_of(y).backward()
    return subject.observe(output=y)


class _Conditioned(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner = mlp(width, out)

    def forward(self, x: Tensor, condition: dict[str, list[Tensor]]) -> Tensor:
        scale, shift = condition["film"]
        y: Tensor = self.inner(x * scale + shift)
        return y


@question(THEME)
def nested_tensors(adapter: Adapter, device: torch.device) -> Observed:
    """All branches get a dict with a list of tensors by keyword; these get their gradients."""
    subject = Subject(adapter, device, _Conditioned)
    film = [torch.full((4,), v, dtype=torch.float64, device=device) for v in (0.5, 0.1)]
    for leaf in film:
        leaf.requires_grad_()
    condition: Any = {"film": [film[0] * 2, film[1].sin()]}
    y = subject(condition=condition)
    loss_of(y).backward()
    return subject.observe(output=y, scale=film[0].grad, shift=film[1].grad)


@question(THEME)
def one_tensor_as_both_streams(adapter: Adapter, device: torch.device) -> Observed:
    """The chain is called with one tensor twice, as Reformer does."""
    subject = Subject(adapter, device)
    half = subject.x.clone()[:, :4]
    y1, y2 = adapter.streams(subject.net, half, half)
    (loss_of(y1) + loss_of(y2)).backward()
    return subject.observe(y1=y1, y2=y2)


@question(THEME)
def low_rank_adapters(adapter: Adapter, device: torch.device) -> Observed:
    """Frozen weights in each branch, and a trained product of two small ones beside them."""

    class LowRank(nn.Linear):
        def __init__(self, width: int, out: int) -> None:
            super().__init__(width, out)
            self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, out, bias=False)
            self.weight.requires_grad_(requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) + self.up(self.down(x))).tanh()

    return Subject(adapter, device, LowRank).step()


@question(THEME)
def pruned(adapter: Adapter, device: torch.device) -> Observed:
    """Branches with pruned weights, which a hook makes from a mask in each run."""

    def branch(width: int, out: int) -> nn.Module:
        net = mlp(width, out)
        prune.l1_unstructured(net.get_submodule("0"), "weight", amount=0.5)
        return net

    return Subject(adapter, device, branch).step()


@question(THEME)
def fake_quantization(adapter: Adapter, device: torch.device) -> Observed:
    """Quantization-aware training: each branch observes ranges and rounds to them, two steps."""

    def branch(width: int, out: int) -> nn.Module:
        quantize = FakeQuantize(MovingAverageMinMaxObserver, dtype=torch.quint8, quant_min=0)
        return nn.Sequential(nn.Linear(width, 7), quantize, nn.Linear(7, out), nn.Tanh())

    subject = Subject(adapter, device, branch)
    first = subject.step()
    return {f"first {name}": value for name, value in first.items()} | subject.step()


class _Averages(nn.Module):
    """Subtracts a moving average, which is a new tensor in each run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.average = nn.Buffer(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.5 * self.average + 0.5 * x.detach().mean(0)
        return x - self.average


@question(THEME)
def replaced_buffer(adapter: Adapter, device: torch.device) -> Observed:
    """A branch replaces a buffer, on which its output depends, in each of two forward passes."""

    def branch(width: int, out: int) -> nn.Module:
        return nn.Sequential(_Averages(width), mlp(width, out))

    subject = Subject(adapter, device, branch)
    (loss_of(subject()) + loss_of(subject(subject.x * 2))).backward()
    return subject.observe()


@question(THEME)
def hook_removed_between(adapter: Adapter, device: torch.device) -> Observed:
    """A forward hook on a branch, which doubles its output, is removed before backward."""
    subject = Subject(adapter, device)
    handle = subject.pairs[1][0].register_forward_hook(lambda *args: args[2] * 2)
    y = subject()
    handle.remove()
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME)
def teacher_between(adapter: Adapter, device: torch.device) -> Observed:
    """An averaged copy of the chain is updated and runs without gradients before backward."""
    subject = Subject(adapter, device, normed)
    teacher = copy.deepcopy(subject.net)
    y = subject()
    with torch.no_grad():
        for old, new in zip(teacher.parameters(), subject.net.parameters(), strict=True):
            old.lerp_(new * 1.1, 0.5)
        target = teacher(subject.x.clone())
    (loss_of(y) + F.mse_loss(y, target)).backward()
    return subject.observe(output=y, target=target)


@question(THEME)
def steps_of_an_optimizer(adapter: Adapter, device: torch.device) -> Observed:
    """Four steps of Adam with gradients clipped: the parameters at the end."""
    subject = Subject(adapter, device)
    parameters = list(subject.parameters.values())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(subject()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return {f"parameters: {i}": p.detach().clone() for i, p in enumerate(parameters)}


@question(THEME)
def skipped_by_chance(adapter: Adapter, device: torch.device) -> Observed:
    """Stochastic depth: each branch is skipped where a random number says so."""

    class Skips(nn.Module):
        def __init__(self, width: int, out: int) -> None:
            super().__init__()
            self.inner, self.out = mlp(width, out), out

        def forward(self, x: Tensor) -> Tensor:
            if torch.rand(()) < 0.5:  # of the CPU, wherever the net is
                return x.new_zeros(*x.shape[:-1], self.out)
            y: Tensor = self.inner(x)
            return y * 2

    return Subject(adapter, device, Skips, random=True).step()


@question(THEME, may_raise=True)
def evaluation_before_backward(adapter: Adapter, device: torch.device) -> Observed:
    """BatchNorm: a pass in training and one in evaluation, then one backward pass for both."""
    subject = Subject(adapter, device, normed)
    y = subject()
    subject.net.eval()
    z = subject(subject.x * 2)
    (loss_of(y) + loss_of(z)).backward()
    return subject.observe(y=y, z=z)


@question(THEME)
def tied_to_what_is_outside(adapter: Adapter, device: torch.device) -> Observed:
    """A weight of a branch is used again behind the chain, as tied embeddings are."""
    subject = Subject(adapter, device)
    weight = getattr(subject.pairs[0][0], "0").weight
    y = subject()
    loss_of(F.linear(y[:, :4], weight)).backward()
    return subject.observe(output=y)
