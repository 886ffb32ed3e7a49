"""What a chain need not look for in modules that are known, and what it looks for all the same."""

import pytest
import torch
from cases import assert_as_stored, chain_of_branches, mlp, step_of
from torch import nn

import revcore
from revcore import randomness


class Plain(nn.Module):
    """A linear layer and what lies on it."""

    def __init__(self, *inside):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inside = nn.ModuleList(inside)

    def forward(self, x):
        x = self.linear(x)
        for module in self.inside:
            x = module(x)
        return x


@revcore.self_contained
class Declared(Plain):
    pass


@revcore.self_contained
class Gated(nn.Module):
    """Breaks the promise: uses a tensor of somebody else."""

    def __init__(self, gate):
        super().__init__()
        self.gate = [gate]

    def forward(self, x):
        return x * self.gate[0]


class Noisy(Declared):
    """A class below one that draws nothing."""

    def forward(self, x):
        return super().forward(x) * torch.rand_like(x)


def add_noise(_module, _arguments, result):
    return result * torch.rand_like(result)


def hooked():
    branch = Declared()
    branch.linear.register_forward_hook(add_noise)
    return branch


def chain_of(branches, device, *, reversing=True):
    blocks = [revcore.ReversibleBlock(branch) for branch in branches]
    chain = revcore.ReversibleSequential(*blocks).double().to(device)
    return revcore.set_reversing(chain, reversing)


def gradients(chain, device):
    chain.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    chain(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in chain.parameters())]


@pytest.mark.parametrize("make", [Plain, Declared, lambda: Declared(Plain())])
def test_generators_are_read_for_those_who_are_not_known(device, monkeypatch, make):
    read, get = [], randomness._get
    monkeypatch.setattr(randomness, "_get", lambda of: read.append(of) or get(of))
    branch = make()
    gradients(chain_of([branch], device), device)
    assert bool(read) is any(type(module) is Plain for module in branch.modules())


@pytest.mark.parametrize(
    "make", [Noisy, hooked, lambda: Declared(nn.Dropout(0.4)), lambda: Declared(Noisy())]
)
def test_draws_that_nobody_declared_away(device, make):
    branches = [make() for _ in range(3)]
    reversed_ = gradients(chain_of(branches, device), device)
    stored = gradients(chain_of(branches, device, reversing=False), device)
    for one, two in zip(reversed_, stored, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("inside", [Plain, Declared])
def test_the_first_graph_is_looked_through_always(device, inside):
    gate = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)
    chain = chain_of([inside(Gated(gate))], device)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        gradients(chain, device)


def test_a_graph_is_looked_through_again_when_a_parameter_is_thawed(device):
    gate = nn.Parameter(torch.rand(4, dtype=torch.float64, device=device), requires_grad=False)
    chain = chain_of([Declared(Gated(gate))], device)
    gradients(chain, device)
    gate.requires_grad_()
    chain[0].coupling.f.linear.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        gradients(chain, device)


@revcore.self_contained
class Conditioned(nn.Module):
    """Uses what is inside of its arguments."""

    def forward(self, x, *, condition):
        return x * condition["scale"]


class Condition:
    """Holds a tensor where nobody looks for one."""

    def __init__(self, scale):
        self.scale = scale

    def __getitem__(self, name):
        return getattr(self, name)


def test_a_tensor_inside_of_an_argument_that_requires_a_gradient_later(device):
    scale = torch.rand(4, dtype=torch.float64, device=device)
    chain = chain_of([Conditioned()], device)
    x = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    chain(x, condition=Condition(scale)).sum().backward()
    with pytest.raises(RuntimeError, match="would get no gradient"):
        chain(x, condition=Condition(scale.requires_grad_())).sum().backward()


def noisy(self, x):
    return nn.functional.linear(x, self.weight + torch.randn_like(self.weight), self.bias)


@pytest.mark.parametrize("warm", [False, True])
def test_a_class_of_torch_that_draws_from_now_on(device, warm, monkeypatch):
    def step(net, x):
        if warm:
            net(x).sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", noisy)
            return step_of(net, x)

    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    assert_as_stored(lambda: chain_of_branches(mlp(4, 4)), x, step)


def test_a_class_of_torch_that_uses_a_tensor_from_now_on(device, monkeypatch):
    scale = torch.ones(4, device=device, requires_grad=True)
    chain = chain_of_branches(mlp(4, 4)).to(device)
    x = torch.randn(5, 8, device=device)
    chain(x).sum().backward()
    plain = nn.Tanh.forward
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: plain(self, x) * scale.sum())
    with pytest.raises(RuntimeError, match="requires a gradient but is neither"):
        chain(x).sum().backward()
