"""What a branch is made of may change between the calls of a chain."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from cases import assert_same, gradients
from torch import Tensor, nn

import revcore


class Noisy(nn.Linear):
    """A layer that other code puts in the place of a linear one, by its class alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.4)


class Watching(nn.Module):
    """Looks at the training flag of a module inside, which by itself makes no use of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if self.linear.training else 3.0)


def replace_a_parameter(branch: nn.Module) -> None:
    branch[0].weight = nn.Parameter(branch[0].weight.detach() * 2)


def replace_a_table(branch: nn.Module) -> None:
    table = branch[0]._parameters
    fresh = {name: nn.Parameter(value.detach() * 2) for name, value in table.items()}
    branch[0].__dict__["_parameters"] = OrderedDict(fresh)


def add_a_module(branch: nn.Module) -> None:
    torch.manual_seed(3)
    branch.append(nn.Linear(4, 4).double())


def replace_a_module(branch: nn.Module) -> None:
    torch.manual_seed(3)
    branch[0] = nn.Linear(4, 4).double()


def add_a_parameter(branch: nn.Module) -> None:
    branch[1].register_parameter("scale", nn.Parameter(torch.tensor(0.5).double()))
    branch[1].register_forward_hook(lambda module, _, y: y * module.scale)


def share_a_parameter(branch: nn.Module) -> None:
    branch[2].weight = branch[0].weight


def drop_a_bias(branch: nn.Module) -> None:
    branch[0].bias = None


def freeze(branch: nn.Module) -> None:
    branch[0].weight.requires_grad_(False)


def parametrize(branch: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(branch[0])


def parametrize_by_a_hook(branch: nn.Module) -> None:
    torch.manual_seed(3)
    nn.utils.spectral_norm(branch[0])


def add_noise_by_a_hook(branch: nn.Module) -> None:
    branch[1].register_forward_hook(lambda _m, _i, y: nn.functional.dropout(y, 0.4))


def swap_a_class(branch: nn.Module) -> None:
    branch[0].__class__ = Noisy


def evaluate(branch: nn.Module) -> None:
    branch.eval()


CHANGES: list[Callable[[nn.Module], None]] = [
    *(replace_a_parameter, replace_a_table, add_a_module, replace_a_module, add_a_parameter),
    *(share_a_parameter, drop_a_bias, freeze, parametrize, parametrize_by_a_hook),
    *(add_noise_by_a_hook, swap_a_class, evaluate),
]


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_branches_that_change_between_calls(
    change: Callable[[nn.Module], None], device: torch.device
) -> None:
    chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(branch()) for _ in range(2)))
    chain.to(device, torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)
    for module in (chain, twin):
        gradients(module, module, x)
        change(module[1].coupling.f)
        module.to(device)
    for _ in range(2):
        found = []
        for module in (chain, twin):
            torch.manual_seed(7)
            found.append(gradients(module, module, x))
        assert_same(*found)


def test_the_flag_of_a_module_inside_is_put_back(device: torch.device) -> None:
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Watching())).to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(6, 8, device=device)
    for module in (chain, twin):
        y = module(x)
        module.eval()
        y.sin().sum().backward()
    for ours, plain in zip(chain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


def test_parameters_of_a_functional_call_do_not_live_on(device: torch.device) -> None:
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).to(device)
    x = torch.randn(6, 8, device=device)
    others = {name: value * 2 for name, value in chain.named_parameters()}
    seen = [weakref.ref(value) for value in others.values()]
    torch.func.functional_call(chain, others, (x,)).sum().backward()
    others.clear()
    assert not any(reference() is not None for reference in seen)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_chain_that_was_used(
    copier: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).to(device)
    x = torch.randn(6, 8, device=device)
    chain(x).sum().backward()
    other = copier(chain)
    for module in (chain, other):
        module.zero_grad()
        module(x).sin().sum().backward()
    for ours, copied in zip(chain.parameters(), other.parameters(), strict=True):
        assert ours is not copied
        assert torch.equal(ours.grad, copied.grad)


def test_a_chain_is_freed_with_its_last_reference(device: torch.device) -> None:
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).to(device)
    chain(torch.randn(6, 8, device=device)).sum().backward()
    seen = [weakref.ref(part) for part in (*chain.modules(), *chain.parameters())]
    del chain
    assert not any(reference() is not None for reference in seen)
