"""What a branch reads and changes beside its input: random numbers, buffers, flags, casts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from conformance.adapters import Adapter
from conformance.questions import Observed, WrongError, compare, question, relative_error
from conformance.subject import Dropout, Subject, dropping, loss_of, mlp, normed

RANDOM = "Random numbers"
BUFFERS = "Buffers and flags"
CASTS = "Mixed precision"


def _dropout(adapter: Adapter, device: torch.device, order: Sequence[int]) -> Observed:
    """Runs forwards, then backwards in an order, against a plain chain with the same masks."""
    subject = Subject(adapter, device, dropping, random=True)
    twin = subject.plain_twin()
    losses = [loss_of(subject(subject.x * (i + 1))) for i in range(len(order))]
    for ours, plain in zip(subject.parts(Dropout), twin.parts(Dropout), strict=True):
        plain.given, ours.noted = iter(ours.noted), None
    expected = [loss_of(twin(twin.x * (i + 1))) for i in range(len(order))]
    for which in order:
        torch.rand(3, device=device)  # so that the generator does not stand where it stood
        losses[which].backward()
        expected[which].backward()
    compare(subject.observe(), twin.observe())
    return {}


@question(RANDOM, alone=True)
def dropout(adapter: Adapter, device: torch.device) -> Observed:
    """The gradient belongs to the masks that the forward pass drew."""
    return _dropout(adapter, device, (0,))


@question(RANDOM, alone=True)
def dropout_first_first(adapter: Adapter, device: torch.device) -> Observed:
    """Two forward passes with dropout, then backward passes in the same order."""
    return _dropout(adapter, device, (0, 1))


@question(RANDOM, alone=True)
def dropout_last_first(adapter: Adapter, device: torch.device) -> Observed:
    """Two forward passes with dropout, then backward passes in the opposite order."""
    return _dropout(adapter, device, (1, 0))


@question(RANDOM)
def next_random_number(adapter: Adapter, device: torch.device) -> Observed:
    """After a step with dropout the global generator gives the number that it gives otherwise."""
    subject = Subject(adapter, device, dropping, random=True)
    subject.step()
    return {"next random number": torch.rand(3, device=device)}


def _two_steps(subject: Subject) -> Observed:
    first = {f"first {name}": value for name, value in subject.step().items()}
    return first | subject.step()


@question(BUFFERS)
def batch_norm_gradients(adapter: Adapter, device: torch.device) -> Observed:
    """BatchNorm in training: outputs and gradients."""
    return Subject(adapter, device, normed).step(buffers=False)


@question(BUFFERS)
def batch_norm_statistics(adapter: Adapter, device: torch.device) -> Observed:
    """BatchNorm in training: statistics are updated exactly once a step."""
    subject = Subject(adapter, device, normed)
    subject.step()
    seen = subject.step()
    return {name: seen[name] for name in seen if name.startswith("buffers")}


@question(BUFFERS)
def batch_norm_evaluation(adapter: Adapter, device: torch.device) -> Observed:
    """BatchNorm in evaluation, with gradients."""

    def branch(width: int, out: int) -> nn.Module:
        net = normed(width, out)
        nn.init.uniform_(net.get_buffer("0.running_mean"))
        nn.init.uniform_(net.get_buffer("0.running_var"), 0.5, 1.5)
        return net

    subject = Subject(adapter, device, branch)
    subject.net.eval()
    return subject.step()


@question(BUFFERS)
def spectral_norm(adapter: Adapter, device: torch.device) -> Observed:
    """Branches with `spectral_norm`, whose vectors change once a step."""

    def branch(width: int, out: int) -> nn.Module:
        net = mlp(width, out)
        nn.utils.parametrizations.spectral_norm(net.get_submodule("0"))
        return net

    return _two_steps(Subject(adapter, device, branch))


@question(BUFFERS)
def weight_norm(adapter: Adapter, device: torch.device) -> Observed:
    """Branches with `weight_norm`."""

    def branch(width: int, out: int) -> nn.Module:
        net = mlp(width, out)
        nn.utils.parametrizations.weight_norm(net.get_submodule("0"))
        return net

    return _two_steps(Subject(adapter, device, branch))


class _Counts(nn.Module):
    """Scales by how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls.clone()


@question(BUFFERS)
def counting_buffer(adapter: Adapter, device: torch.device) -> Observed:
    """A branch counts its calls in a buffer, on which its output depends."""

    def branch(width: int, out: int) -> nn.Module:
        return nn.Sequential(_Counts(), mlp(width, out))

    subject = Subject(adapter, device, branch)
    (loss_of(subject()) + loss_of(subject(subject.x * 2))).backward()
    return subject.observe()


@question(BUFFERS)
def flag_changed_between(adapter: Adapter, device: torch.device) -> Observed:
    """`eval()` between forward and backward."""
    subject = Subject(adapter, device, normed)
    loss = loss_of(subject())
    subject.net.eval()
    loss.backward()
    return subject.observe(training=any(m.training for m in subject.net.modules()))


class _Fails(nn.Module):
    """Passes on what it gets, until it is told to fail."""

    failing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.failing:
            raise FloatingPointError("told to fail")
        return x


class _Draws(nn.Module):
    """Draws random numbers that change nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.rand_like(x)


def _failing_branch(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), _Draws(), nn.Linear(width, out), _Fails())


def _after_failure(subject: Subject) -> Observed:
    """Returns what may have been left changed, and another step."""
    subject.zero_grad()
    left: dict[str, Any] = {f"left {name}": value for name, value in subject.observe().items()}
    left["flags"] = [module.training for branch in subject.branches for module in branch.modules()]
    left["tracking"] = [m.track_running_stats for m in subject.parts(nn.BatchNorm1d)]
    return left | subject.step(buffers=False)


@question(BUFFERS)
def exception_in_forward(adapter: Adapter, device: torch.device) -> Observed:
    """A branch raises in the forward pass: nothing is left changed, the next step is right."""
    subject = Subject(adapter, device, _failing_branch, random=True)
    failing = subject.parts(_Fails)[3]
    failing.failing = True
    with suppress(FloatingPointError):
        subject()
    failing.failing = False
    return _after_failure(subject)


@question(BUFFERS)
def exception_in_recomputation(adapter: Adapter, device: torch.device) -> Observed:
    """A branch raises while it is recomputed: nothing is left changed, the next step is right."""
    subject = Subject(adapter, device, _failing_branch, random=True)
    loss = loss_of(subject())
    failing = subject.parts(_Fails)[3]
    failing.failing = True
    torch.manual_seed(2)
    with suppress(FloatingPointError):
        loss.backward()
    failing.failing = False
    return {"next random number": torch.rand(3, device=device), **_after_failure(subject)}


class _SeesDtype(nn.Module):
    """Notes the types of what passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(str(x.dtype))
        return x


def _cast_branch(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), _SeesDtype(), nn.Tanh(), nn.Linear(16, out))


def _autocast(
    adapter: Adapter, device: torch.device, dtype: torch.dtype, *, inside: bool, scaled: bool
) -> Observed:
    """Runs a step under autocast, which may be as far from float64 as the plain chain's."""
    exact = Subject(adapter, device, _cast_branch, (8, 8)).plain_twin()
    expected = exact.step()

    def step(subject: Subject) -> tuple[dict[str, Any], list[set[str]]]:
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=scaled)
        optimizer = torch.optim.SGD([subject.x, *subject.parameters.values()], lr=0.0)
        with torch.autocast(device.type, dtype=dtype):
            y = subject()
            loss = loss_of(y.float())
            if inside:
                scaler.scale(loss).backward()
        if not inside:
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return subject.observe(output=y), [module.seen for module in subject.parts(_SeesDtype)]

    subject = Subject(adapter, device, _cast_branch, (8, 8), dtype=torch.float32)
    plain, plain_seen = step(subject.plain_twin())
    observed, seen = step(subject)
    if seen != plain_seen:
        raise WrongError(f"inside branches: {sorted(seen[0])}, plain {sorted(plain_seen[0])}")
    allowed = max(relative_error(plain[name], value) for name, value in expected.items())
    compare(observed, expected, tolerance=2 * allowed)
    return {}


@question(CASTS, alone=True)
def autocast_bf16(adapter: Adapter, device: torch.device) -> Observed:
    """Autocast to bfloat16 around the forward pass; the casts inside branches are the same."""
    return _autocast(adapter, device, torch.bfloat16, inside=False, scaled=False)


@question(CASTS, alone=True)
def autocast_bf16_backward(adapter: Adapter, device: torch.device) -> Observed:
    """Autocast to bfloat16 around forward and backward."""
    return _autocast(adapter, device, torch.bfloat16, inside=True, scaled=False)


@question(CASTS, alone=True)
def autocast_fp16(adapter: Adapter, device: torch.device) -> Observed:
    """Autocast to float16 with a `GradScaler`."""
    return _autocast(adapter, device, torch.float16, inside=False, scaled=True)
