"""Ways to use a chain: parts of it, several times, with more than a tensor."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conformance.adapters import Adapter
from conformance.plain import Pair
from conformance.questions import Observed, question
from conformance.subject import Subject, loss_of, mlp

THEME = "Uses"


@question(THEME)
def input_used_afterwards(adapter: Adapter, device: torch.device) -> Observed:
    """The caller holds the input and uses it after the chain, as a skip connection does."""
    subject = Subject(adapter, device)
    h = subject.x * 2
    y = subject.net(h)
    loss_of(y + h.sin()).backward()
    return subject.observe(output=y, input=h)


@question(THEME)
def kept_inputs(adapter: Adapter, device: torch.device) -> Observed:
    """Every second block is told to keep its input, which the caller uses afterwards."""
    subject = Subject(adapter, device)
    adapter.keep_inputs(subject.net)
    h = subject.x * 2
    y = subject.net(h)
    loss_of(y + h.sin()).backward()
    return subject.observe(output=y, input=h)


@question(THEME)
def intermediate_alone(adapter: Adapter, device: torch.device) -> Observed:
    """The loss comes from a block in the middle alone."""
    subject = Subject(adapter, device)
    middle, _ = adapter.tap(subject.net, subject.x.clone(), 1)
    loss_of(middle).backward()
    return subject.observe(middle=middle)


@question(THEME)
def intermediate_and_final(adapter: Adapter, device: torch.device) -> Observed:
    """The loss comes from a block in the middle and from the output."""
    subject = Subject(adapter, device)
    middle, y = adapter.tap(subject.net, subject.x.clone(), 1)
    (loss_of(middle) + loss_of(y)).backward()
    return subject.observe(middle=middle, output=y)


@question(THEME)
def two_streams(adapter: Adapter, device: torch.device) -> Observed:
    """The chain is called with two tensors, and the loss comes from one of the two outputs."""
    subject = Subject(adapter, device)
    x1, x2 = subject.x.clone().chunk(2, 1)
    y1, y2 = adapter.streams(subject.net, x1, x2)
    loss_of(y1).backward()
    return subject.observe(y1=y1, y2=y2)


@question(THEME)
def twice_in_one_forward(adapter: Adapter, device: torch.device) -> Observed:
    """The chain is used twice in one forward pass, the second time on its own output."""
    subject = Subject(adapter, device)
    y = subject(subject())
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME)
def two_forwards_one_backward(adapter: Adapter, device: torch.device) -> Observed:
    """Two forward passes on different inputs, and one backward pass for both."""
    subject = Subject(adapter, device)
    y, z = subject(), subject(subject.x * 2)
    (loss_of(y) + loss_of(z)).backward()
    return subject.observe(y=y, z=z)


@question(THEME)
def shared_parameters(adapter: Adapter, device: torch.device) -> Observed:
    """Two branches of different blocks share a parameter."""

    def tie(pairs: list[Pair]) -> list[Pair]:
        first, last = (getattr(pair[side], "0") for pair, side in ((pairs[0], 0), (pairs[2], 1)))
        last.weight = first.weight
        return pairs

    return Subject(adapter, device, prepare=tie).step()


@question(THEME)
def shared_module(adapter: Adapter, device: torch.device) -> Observed:
    """One module is both branches of a block, and a branch of the next block."""

    def share(pairs: list[Pair]) -> list[Pair]:
        one = pairs[0][0]
        return [(one, one), (one, pairs[1][1]), pairs[2]]

    return Subject(adapter, device, prepare=share).step()


class _Scaled(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner = mlp(width, out)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x * scale)
        return y


@question(THEME)
def extra_tensors(adapter: Adapter, device: torch.device) -> Observed:
    """All branches get a further tensor by keyword, and it gets its gradient."""
    subject = Subject(adapter, device, _Scaled)
    leaf = torch.linspace(0.5, 1.5, 4, dtype=torch.float64, device=device, requires_grad=True)
    y = subject(scale=leaf * 2)
    loss_of(y).backward()
    return subject.observe(output=y, scale=leaf.grad)


@question(THEME)
def functional_call(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.func.functional_call` with other parameters, which get the gradients."""
    subject = Subject(adapter, device)
    others = {
        name: (parameter.detach() * 2).requires_grad_()
        for name, parameter in subject.net.named_parameters()
    }
    y = torch.func.functional_call(subject.net, others, (subject.x.clone(),))
    loss_of(y).backward()
    found = {id(p): others[name].grad for name, p in subject.net.named_parameters()}
    ordered = {name: found[id(p)] for name, p in subject.parameters.items()}
    return subject.observe(output=y) | {f"of others: {name}": g for name, g in ordered.items()}


@question(THEME)
def parameters_replaced_between(adapter: Adapter, device: torch.device) -> Observed:
    """A branch's parameters are replaced between forward and backward; the old ones count."""
    subject = Subject(adapter, device)
    y = subject()
    old = list(subject.parameters.values())
    for layer in subject.parts(nn.Linear):
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    loss_of(y).backward()
    gradients = {f"of the old: {i}": parameter.grad for i, parameter in enumerate(old)}
    return gradients | {"input": subject.x.grad}


class _Recurrent(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(width, out, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.recurrent(x)[0]
        return y


@question(THEME)
def recurrent_branch(adapter: Adapter, device: torch.device) -> Observed:
    """A GRU in each branch."""
    return Subject(adapter, device, _Recurrent, (2, 5, 4), split_dim=2).step()


class _Experts(nn.Module):
    """Sends each sample to the expert that likes it best."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Linear(width, out) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, choice = self.router(x).softmax(-1).max(-1)
        y = x.new_zeros(len(x), self.experts[0].out_features)  # type: ignore[arg-type]
        for number, expert in enumerate(self.experts):
            chosen = (choice == number).nonzero()[:, 0]
            if len(chosen):
                y = y.index_add(0, chosen, expert(x[chosen]).tanh() * weight[chosen, None])
        return y


@question(THEME)
def experts(adapter: Adapter, device: torch.device) -> Observed:
    """A mixture of experts in each branch: what runs depends on the data."""
    return Subject(adapter, device, _Experts, (16, 4)).step()


@question(THEME)
def nested_chain(adapter: Adapter, device: torch.device) -> Observed:
    """A chain in a branch of a chain."""

    class Outer(nn.Module):
        def __init__(self, width: int, out: int) -> None:
            super().__init__()
            inner = 2 * adapter.formula.factor
            pairs = [(mlp(2, inner).to(device), mlp(2, inner).to(device)) for _ in range(2)]
            # Here first, so that their names do not depend on the library.
            self.inner = nn.ModuleList(branch for pair in pairs for branch in pair)
            self.before, self.after = nn.Linear(width, 4), nn.Linear(4, out)
            self.chain: nn.Module = adapter.build([(f.double(), g.double()) for f, g in pairs])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.after(self.chain(self.before(x).tanh()).tanh())
            return y

    return Subject(adapter, device, Outer).step()


@question(THEME)
def checkpointed(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.utils.checkpoint` around the chain."""
    subject = Subject(adapter, device, passes=2)
    y = checkpoint(subject, subject.x, use_reentrant=False)
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME)
def saved_tensors_hooks(adapter: Adapter, device: torch.device) -> Observed:
    """`saved_tensors_hooks` that copy what autograd saves, and anomaly detection."""
    subject = Subject(adapter, device)
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x),
    ):
        y = subject()
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME, may_raise=True)
def captured_tensor(adapter: Adapter, device: torch.device) -> Observed:
    """A branch uses a tensor that is no parameter and requires a gradient: no silent loss of it."""
    captured = torch.ones(4, dtype=torch.float64, device=device, requires_grad=True)

    class Captures(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * captured)

    subject = Subject(adapter, device, Captures)
    return subject.step() | {"captured": captured.grad}


@question(THEME)
def affine_coupling(adapter: Adapter, device: torch.device) -> Observed:
    """The affine coupling `a * exp(t) + t`, in place of the additive one."""
    return Subject(adapter.affine(), device).step()


@question(THEME)
def inverse(adapter: Adapter, device: torch.device) -> Observed:
    """`inverse` returns the input, and the gradients of the inverse are right."""
    subject = Subject(adapter, device)
    z = adapter.inverse(subject.net, subject())
    with torch.no_grad():
        back = adapter.inverse(subject.net, subject())
    again = adapter.inverse(subject.net, subject.x.clone())
    loss_of(again).backward()
    return subject.observe(back=back, again=again, z=z)
