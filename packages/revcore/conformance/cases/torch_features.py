"""The rest of PyTorch: hooks, copies, threads, compilers, transforms."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conformance.adapters import Adapter, CannotAskError
from conformance.plain import Pair
from conformance.questions import Observed, question
from conformance.subject import Subject, loss_of, normed

HOOKS = "Hooks"
COPIES = "Copies and threads"
COMPILERS = "Compilers and transforms"

# What is asked is whether a chain can be traced and differentiated, not what code is made of it.
BACKEND = "aot_eager"


@question(HOOKS)
def forward_hook(adapter: Adapter, device: torch.device) -> Observed:
    """A forward hook on a branch, which doubles its output."""
    subject = Subject(adapter, device)
    subject.pairs[1][0].register_forward_hook(lambda *args: args[2] * 2)
    return subject.step()


@question(HOOKS)
def forward_pre_hook(adapter: Adapter, device: torch.device) -> Observed:
    """A forward pre-hook on a branch, which halves its input."""
    subject = Subject(adapter, device)
    subject.pairs[1][1].register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    return subject.step()


@question(HOOKS)
def full_backward_hook(adapter: Adapter, device: torch.device) -> Observed:
    """A full backward hook on a branch runs once and sees the gradients."""
    subject = Subject(adapter, device)
    seen: list[Tensor] = []
    subject.pairs[1][0].register_full_backward_hook(lambda _, i, o: seen.extend((*i, *o)))
    step = subject.step()
    return {
        "calls": len(seen),
        **step,
        **{f"gradients seen: {i}": value for i, value in enumerate(seen)},
    }


@question(HOOKS)
def full_backward_pre_hook(adapter: Adapter, device: torch.device) -> Observed:
    """A full backward pre-hook on a branch, which doubles the gradient of its output."""
    subject = Subject(adapter, device)
    subject.pairs[1][0].register_full_backward_pre_hook(lambda _, o: (o[0] * 2,))
    return subject.step()


@question(HOOKS)
def tensor_hooks(adapter: Adapter, device: torch.device) -> Observed:
    """Hooks on the chain's input and output, which change the gradients, run once."""
    subject = Subject(adapter, device)
    seen: list[Tensor] = []

    def double(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient * 2

    h = subject.x * 2
    h.register_hook(double)
    y = subject.net(h)
    y.register_hook(double)
    loss_of(y).backward()
    return subject.observe(calls=len(seen), first=seen[0], last=seen[-1])


@question(HOOKS)
def flop_counter(adapter: Adapter, device: torch.device) -> Observed:
    """A step under torch's `FlopCounterMode`."""
    subject = Subject(adapter, device)
    with FlopCounterMode(display=False):
        return subject.step()


@question(HOOKS)
def parameter_hook(adapter: Adapter, device: torch.device) -> Observed:
    """A hook on a parameter, which doubles its gradient, runs once."""
    subject = Subject(adapter, device)
    calls: list[str] = []

    def hook(gradient: Tensor) -> Tensor:
        calls.append("called")
        return gradient * 2

    parameter = next(subject.pairs[1][0].parameters())
    parameter.register_hook(hook)
    return subject.step() | {"calls": len(calls)}


@question(HOOKS)
def post_accumulate_hook(adapter: Adapter, device: torch.device) -> Observed:
    """A post-accumulate hook on a parameter, in which an optimizer steps, runs once."""
    subject = Subject(adapter, device)
    seen: list[Tensor] = []

    def hook(parameter: Tensor) -> None:
        seen.append(parameter.grad.clone())  # type: ignore[union-attr]
        parameter.data.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]

    parameter = next(subject.pairs[1][0].parameters())
    parameter.register_post_accumulate_grad_hook(hook)
    step = subject.step()
    return step | {"calls": len(seen), "parameter": parameter.detach(), "seen": seen[0]}


@question(HOOKS)
def state_dict_hooks(adapter: Adapter, device: torch.device) -> Observed:
    """Hooks on a branch's state dict run once when it is saved and once when it is loaded."""
    subject = Subject(adapter, device)
    calls: list[str] = []
    branch = subject.pairs[1][0]
    branch.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    branch.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    branch.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    branch.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    subject.net.load_state_dict(subject.net.state_dict())
    return subject.step() | {"calls": calls}


def _with_copy(subject: Subject, net: nn.Module) -> Observed:
    """Returns a step of a copied net and one of the first net, which must not know it."""
    other = copy.copy(subject)
    other.net = net
    found = {f"copy's {name}": value for name, value in other.step().items()}
    return found | subject.step()


@question(COPIES)
def deepcopy(adapter: Adapter, device: torch.device) -> Observed:
    """`copy.deepcopy` of a chain that has made a step."""
    subject = Subject(adapter, device)
    subject.step()
    subject.zero_grad()
    return _with_copy(subject, copy.deepcopy(subject.net))


@question(COPIES)
def pickled(adapter: Adapter, device: torch.device) -> Observed:
    """`pickle` of a chain that has made a step."""
    subject = Subject(adapter, device)
    subject.step()
    return _with_copy(subject, pickle.loads(pickle.dumps(subject.net)))


@question(COPIES)
def state_dict(adapter: Adapter, device: torch.device) -> Observed:
    """A state dict, saved and loaded into a chain with other parameters."""
    subject = Subject(adapter, device, normed)
    file = io.BytesIO()
    torch.save(subject.net.state_dict(), file)
    file.seek(0)
    other = Subject(adapter, device, normed, seed=2)
    other.net.load_state_dict(torch.load(file, weights_only=True))
    other.x = subject.x
    return other.step(buffers=False)


@question(COPIES)
def meta_device(adapter: Adapter, device: torch.device) -> Observed:
    """A chain made on the meta device, then `to_empty` and a state dict."""
    subject = Subject(adapter, device)
    other = Subject(adapter, torch.device("meta"), seed=2)
    shape = other(other.x).shape
    other.net = other.net.to_empty(device=device)
    other.net.load_state_dict(subject.net.state_dict())
    other.x = subject.x
    return other.step() | {"shape": shape}


@question(COPIES)
def two_threads(adapter: Adapter, device: torch.device) -> Observed:
    """Two chains are trained in two threads at once."""
    subjects = [Subject(adapter, device, normed, seed=seed) for seed in (1, 2)]
    errors: list[Exception] = []

    def train(subject: Subject) -> None:
        try:
            for _ in range(10):
                loss_of(subject()).backward()
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=train, args=(subject,)) for subject in subjects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {
        f"{position}: {name}": value
        for position, subject in enumerate(subjects)
        for name, value in subject.observe().items()
        if not name.startswith("buffers")
    }


@question(COMPILERS)
def cuda_graph(adapter: Adapter, device: torch.device) -> Observed:
    """Forward and backward captured in a CUDA graph and replayed on another input."""
    if device.type != "cuda":
        raise CannotAskError("there are CUDA graphs on GPUs alone")
    subject = Subject(adapter, device)
    other = (subject.x * 2).detach()
    if adapter.reference:
        subject.x.data.copy_(other)
        return subject.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            subject.step()
    torch.cuda.current_stream().wait_stream(stream)
    subject.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = subject()
        loss_of(y).backward()
    subject.x.data.copy_(other)
    graph.replay()
    return subject.observe(output=y)


def _two_steps(subject: Subject, run: Callable[[Tensor], Tensor]) -> Observed:
    """Returns the second of two steps, in case that the first one compiles."""
    try:
        for _ in range(2):
            subject.zero_grad()
            y = run(subject.x)
            loss_of(y).backward()
    finally:
        torch._dynamo.reset()
    return subject.observe(output=y)


def _compile(branch: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(branch, backend=BACKEND))


@question(COMPILERS)
def compiled_branches(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.compile` of each branch."""

    def prepare(pairs: list[Pair]) -> list[Pair]:
        if adapter.reference:
            return pairs
        return [(_compile(f), _compile(g)) for f, g in pairs]

    subject = Subject(adapter, device, depth=2, prepare=prepare)
    return _two_steps(subject, subject)


def _compiled_net(adapter: Adapter, device: torch.device, *, fullgraph: bool) -> Observed:
    subject = Subject(adapter, device, depth=2)

    def run(x: Tensor) -> Tensor:
        y: Tensor = subject.net(x * 2).tanh()
        return y

    if not adapter.reference:
        run = torch.compile(run, backend=BACKEND, fullgraph=fullgraph)
    return _two_steps(subject, run)


@question(COMPILERS)
def compiled_net(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.compile` of a function that calls the chain, where graph breaks are allowed."""
    return _compiled_net(adapter, device, fullgraph=False)


@question(COMPILERS, may_raise=True)
def compiled_net_fullgraph(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.compile` of a function that calls the chain, with `fullgraph=True`."""
    return _compiled_net(adapter, device, fullgraph=True)


@question(COMPILERS, may_raise=True)
def func_grad(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.func.grad` by the input."""
    subject = Subject(adapter, device)
    if adapter.reference:
        return {"gradient": subject.step()["gradient of the input"]}
    return {"gradient": torch.func.grad(lambda x: loss_of(subject(x)))(subject.x.detach())}


@question(COMPILERS, may_raise=True)
def func_vmap(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.func.vmap` over a further dimension."""
    subject = Subject(adapter, device)
    x = subject.x.detach()
    batch = torch.stack((x, x * 2, x * 3))
    if adapter.reference:
        return {"output": torch.stack([subject(x) for x in batch])}
    return {"output": torch.func.vmap(subject)(batch)}


@question(COMPILERS, may_raise=True)
def func_jvp(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.func.jvp`, a derivative in forward mode."""
    subject = Subject(adapter, device)
    tangent = torch.ones_like(subject.x)
    if adapter.reference:
        return {"derivative": (subject.step()["gradient of the input"] * tangent).sum()}
    point = subject.x.detach()
    found = torch.func.jvp(lambda x: loss_of(subject(x)), (point,), (tangent,))
    return {"derivative": found[1]}


@question(COMPILERS, may_raise=True)
def exported(adapter: Adapter, device: torch.device) -> Observed:
    """`torch.export`, and a run of what was exported."""
    subject = Subject(adapter, device)
    x = subject.x.detach()
    if adapter.reference:
        return {"output": subject.net(x)}
    return {"output": torch.export.export(subject.net, (x,)).module()(x.clone())}
