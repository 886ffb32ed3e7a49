"""Every way to ask autograd for gradients."""

from __future__ import annotations

import torch

from conformance.adapters import Adapter
from conformance.questions import Observed, compare, question
from conformance.subject import Subject, loss_of

THEME = "Gradients"


@question(THEME)
def backward(adapter: Adapter, device: torch.device) -> Observed:
    """`loss.backward()`."""
    return Subject(adapter, device).step()


@question(THEME)
def leaf_input(adapter: Adapter, device: torch.device) -> Observed:
    """The chain's input is a leaf that requires a gradient."""
    subject = Subject(adapter, device)
    y = subject.net(subject.x)
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME)
def input_without_gradient(adapter: Adapter, device: torch.device) -> Observed:
    """The chain's input requires no gradient, as that of a net's first layer."""
    subject = Subject(adapter, device)
    y = subject(subject.x.detach())
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME)
def grad_of_input(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.autograd.grad` by the input."""
    subject = Subject(adapter, device)
    (gradient,) = torch.autograd.grad(loss_of(subject()), subject.x)
    return subject.observe(gradient=gradient)


@question(THEME)
def grad_of_parameters(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.autograd.grad` by all parameters."""
    subject = Subject(adapter, device)
    parameters = subject.parameters
    found = torch.autograd.grad(loss_of(subject()), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@question(THEME)
def grad_of_subset(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.autograd.grad` by the input and one parameter in the middle."""
    subject = Subject(adapter, device)
    one = next(subject.pairs[1][0].parameters())
    found = torch.autograd.grad(loss_of(subject()), (subject.x, one))
    return subject.observe(input=found[0], parameter=found[1])


@question(THEME)
def backward_inputs(adapter: Adapter, device: torch.device) -> Observed:
    """`backward(inputs=...)`, in two parts of the parameters."""
    subject = Subject(adapter, device, passes=2)
    parameters = list(subject.parameters.values())
    loss = loss_of(subject())
    loss.backward(inputs=parameters[8:], retain_graph=True)
    loss.backward(inputs=parameters[:8])
    return subject.observe()


@question(THEME)
def accumulation(adapter: Adapter, device: torch.device) -> Observed:
    """Gradients accumulated over two steps."""
    subject = Subject(adapter, device)
    for factor in (1, 2):
        loss_of(subject(subject.x * factor)).backward()
    return subject.observe()


@question(THEME)
def retained_graph(adapter: Adapter, device: torch.device) -> Observed:
    """A second backward pass over a retained graph."""
    subject = Subject(adapter, device, passes=2)
    loss = loss_of(subject())
    loss.backward(retain_graph=True)
    loss.backward()
    return subject.observe()


@question(THEME)
def two_outputs(adapter: Adapter, device: torch.device) -> Observed:
    """Two calls of `torch.autograd.grad`, for the two halves of the output."""
    subject = Subject(adapter, device, passes=2)
    y1, y2 = subject().chunk(2, 1)
    (first,) = torch.autograd.grad(loss_of(y1), subject.x, retain_graph=True)
    (second,) = torch.autograd.grad(loss_of(y2), subject.x)
    return {"first": first, "second": second}


@question(THEME)
def one_stream(adapter: Adapter, device: torch.device) -> Observed:
    """The loss comes from one half of the output alone."""
    subject = Subject(adapter, device)
    loss_of(subject().chunk(2, 1)[0]).backward()
    return subject.observe()


@question(THEME)
def frozen_branch(adapter: Adapter, device: torch.device) -> Observed:
    """A branch in the middle is frozen."""
    subject = Subject(adapter, device)
    branch = subject.pairs[1][0].requires_grad_(False)
    return subject.step() | {"frozen": all(p.grad is None for p in branch.parameters())}


@question(THEME)
def frozen_prefix(adapter: Adapter, device: torch.device) -> Observed:
    """The first block is frozen, and the input requires no gradient."""
    subject = Subject(adapter, device)
    for branch in subject.pairs[0]:
        branch.requires_grad_(False)
    y = subject(subject.x.detach())
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME)
def frozen_between(adapter: Adapter, device: torch.device) -> Observed:
    """A block is frozen between forward and backward."""
    subject = Subject(adapter, device)
    y = subject()
    for branch in subject.pairs[1]:
        branch.requires_grad_(False)
    loss_of(y).backward()
    return subject.observe(output=y)


@question(THEME)
def no_grad(adapter: Adapter, device: torch.device) -> Observed:
    """A call under `torch.no_grad`, and an ordinary step after it."""
    subject = Subject(adapter, device)
    with torch.no_grad():
        y = subject()
    return subject.step() | {"without": y, "requires a gradient": y.requires_grad}


@question(THEME)
def inference_mode(adapter: Adapter, device: torch.device) -> Observed:
    """A call under `torch.inference_mode`, and an ordinary step after it."""
    subject = Subject(adapter, device)
    with torch.inference_mode():
        y = subject()
    return subject.step() | {"without": y.clone(), "requires a gradient": y.requires_grad}


@question(THEME, refused=True)
def optimizer_step_between(adapter: Adapter, device: torch.device) -> Observed:
    """An optimizer's step between forward and backward (plain autograd raises)."""
    subject = Subject(adapter, device)
    expected = subject.plain_twin().step()
    optimizer = torch.optim.SGD(subject.parameters.values(), lr=0.1)
    subject.step()
    y = subject()
    optimizer.step()
    subject.zero_grad()
    loss_of(y).backward()
    compare(subject.observe(output=y), expected)
    return {}


@question(THEME, may_raise=True)
def double_backward(adapter: Adapter, device: torch.device) -> Observed:
    """`create_graph=True`, and a backward pass through the gradient."""
    subject = Subject(adapter, device)
    (gradient,) = torch.autograd.grad(loss_of(subject()), subject.x, create_graph=True)
    gradient.square().sum().backward()
    return subject.observe()


@question(THEME, may_raise=True)
def gradient_penalty(adapter: Adapter, device: torch.device) -> Observed:
    """A loss with a penalty on the norm of its gradient by the input."""
    subject = Subject(adapter, device)
    loss = loss_of(subject())
    (gradient,) = torch.autograd.grad(loss, subject.x, create_graph=True)
    parameters = subject.parameters
    total = loss + gradient.norm()
    found = torch.autograd.grad(total, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))
