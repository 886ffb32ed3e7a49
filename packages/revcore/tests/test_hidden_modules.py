"""Modules that a branch holds without registering them, or gets as arguments."""

import copy
import weakref

import pytest
import torch
from cases import assert_as_stored, chain_of_branches, step_of
from torch import nn

import revcore
from revcore.survey import Survey


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(6, 8, dtype=torch.float64, device=device)


class Hides(nn.Module):
    """Holds a module without registering it."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how
        norm = nn.BatchNorm1d(4, affine=False, momentum=0.5).double()
        if how == "list":
            self.norms = [norm]
        elif how == "tuple":
            self.norms = (norm, "name")
        else:
            self.__dict__["norms"] = {0: norm}

    def forward(self, x):
        norm = self.norms[0]
        y = norm(x)
        return self.linear(y) * norm.running_mean.sum().cos() * norm.num_batches_tracked


def states_after(take):
    def taken(net, x):
        hidden = [m.norms[0] for m in net.modules() if isinstance(m, Hides)]
        return [*take(net, x), *(buffer.double() for norm in hidden for buffer in norm.buffers())]

    return taken


@pytest.mark.parametrize("how", ["list", "tuple", "attribute"])
def test_modules_that_are_not_registered(how, x):
    if x.is_cuda:
        pytest.skip("a hidden module does not move with the others")
    assert_as_stored(lambda: chain_of_branches(Hides(how)), x, states_after(step_of), steps=3)


class Holds(nn.Linear):
    """Holds a list, in which anything may be."""

    held = ()


def test_a_branch_that_holds_what_holds_it(x):
    chain = chain_of_branches(Holds(4, 4)).to(x)
    for branch in (m for m in chain.modules() if isinstance(m, Holds)):
        branch.held = [chain, nn.Linear(4, 4)]
    found = step_of(chain, x)
    torch.testing.assert_close(found, step_of(revcore.set_reversing(chain, False), x))


class Normed(nn.Module):
    """Gets a module as an argument."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, norm):
        norm = norm["norm"] if isinstance(norm, dict) else norm
        y = self.linear(norm(x))
        return y * norm.running_mean.sum().cos() * int(norm.num_batches_tracked)


@pytest.mark.parametrize("nested", [False, True])
def test_modules_among_the_arguments(nested, x):
    norms = [nn.BatchNorm1d(4, affine=False, momentum=0.5).to(x) for _ in range(2)]
    one, two = chain_of_branches(Normed()).to(x), None
    two = revcore.set_reversing(copy.deepcopy(one), False)
    for _ in range(3):
        found = []
        for net, norm in zip((one, two), norms, strict=True):
            net.zero_grad()
            y = net(x.clone().requires_grad_(), norm={"norm": norm} if nested else norm)
            y.square().sum().backward()
            found.append([y, *(p.grad for p in net.parameters()), *norm.buffers()])
        torch.testing.assert_close(*found)


class Inert(nn.Module):
    """Holds what looks like a module and is none, or cannot be looked into."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.holders = [weakref.proxy(self.linear), nn.Module.__new__(nn.Linear)]
        self.tensors = {torch.ones(4)}
        self.around = [self.linear]
        self.around.append(self.around)

    def forward(self, x):
        return self.linear(x)


def test_what_is_no_module_in_an_attribute(x):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Inert(), Inert())).to(x)
    found = step_of(chain, x)
    torch.testing.assert_close(found, step_of(revcore.set_reversing(chain, False), x))


class Asks(nn.Module):
    """Asks a module that holds a list of another, both of which are hidden."""

    def __init__(self):
        super().__init__()
        self.linear, self.teachers = nn.Linear(4, 4).double(), [Hides("list").double()]

    def forward(self, x):
        with torch.no_grad():
            taught = self.teachers[0](x)
        return self.linear(x + taught)


def test_modules_that_hidden_modules_hide():
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Asks(), Asks()))
    step_of(chain, torch.randn(6, 8, dtype=torch.float64))
    hidden = [m.teachers[0].norms[0] for m in chain.modules() if isinstance(m, Asks)]
    assert [norm.num_batches_tracked for norm in hidden] == [1, 1]


def test_a_teacher_in_evaluation_is_no_part_of_a_branch():
    branch = Asks()
    assert len(Survey(branch).modules) == 4
    branch.teachers[0].eval()
    assert Survey(branch).modules == [branch, branch.linear]
