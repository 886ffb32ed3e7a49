"""Blocks of a chain share nodes of autograd, but for what somebody would miss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import SCHEMES, assert_same, gradients, make_case
from torch import Tensor, nn

import revcore


@pytest.fixture(autouse=True)
def few_steps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short chains have several nodes, too."""
    monkeypatch.setattr("revcore.parts._STEPS_AT_ONCE", 16)


def nodes_of(y: Tensor) -> int:
    """Counts the engine's nodes in a graph."""
    seen, nodes = set(), [y.grad_fn]
    for node in nodes:  # grows meanwhile
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "_StepsNodeBackward" for node in seen)


def chain_of(blocks: int, device: torch.device) -> revcore.ReversibleSequential:
    torch.manual_seed(0)
    chain = revcore.ReversibleSequential(
        *(revcore.ReversibleBlock(nn.Linear(2, 2), nn.Tanh()) for _ in range(blocks))
    )
    return chain.to(device, torch.float64)


def leave(_chain: nn.Sequential) -> None:
    pass


def keep_an_input(chain: nn.Sequential) -> None:
    chain[4].keep_input = True


def hook(chain: nn.Sequential) -> None:
    chain[4].register_forward_hook(lambda _module, _inputs, _y: None)


def hook_backward(chain: nn.Sequential) -> None:
    chain[4].register_full_backward_hook(lambda _module, _grad_x, _grad_y: None)


def replace_the_forward(chain: nn.Sequential) -> None:
    forward = chain[4].forward
    chain[4].forward = lambda *x: forward(*x)  # noqa: PLW0108 - another function


class Block(revcore.ReversibleBlock):
    """Does something else in its forward pass."""

    def forward(self, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return super().forward(*x)


def subclass(chain: nn.Sequential) -> None:
    chain[4].__class__ = Block


class Same(revcore.ReversibleBlock):
    """Does nothing else."""


def subclass_that_changes_nothing(chain: nn.Sequential) -> None:
    chain[4].__class__ = Same


class Coupling(revcore.AdditiveCoupling):
    """Does something else in its forward pass."""

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(*x)


def use_couplings(chain: nn.Sequential) -> None:
    chain[3], chain[4] = chain[3].coupling, chain[4].coupling


def use_a_coupling_of_another_class(chain: nn.Sequential) -> None:
    chain[4] = chain[4].coupling
    chain[4].__class__ = Coupling


@pytest.mark.parametrize(
    ("change", "nodes"),
    [
        (leave, 3),  # eight blocks, three, and the last one by itself
        (keep_an_input, 3),  # four, seven, one
        (hook, 5),  # four, one by half-steps, six, one
        (hook_backward, 5),
        (replace_the_forward, 5),
        (subclass, 5),
        (subclass_that_changes_nothing, 3),
        (use_couplings, 3),
        (use_a_coupling_of_another_class, 4),
    ],
)
def test_how_many_nodes_a_chain_has(
    change: Callable[[nn.Sequential], None], nodes: int, device: torch.device
) -> None:
    chain = chain_of(12, device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    change(chain)
    x = torch.randn(3, 4, dtype=torch.float64, device=device)
    assert nodes_of(chain(x)) == nodes
    # By position, because names may have changed.
    found = [dict(enumerate(gradients(net, net, x).values())) for net in (chain, twin)]
    assert_same(*found)


def test_large_streams_have_a_node_for_each_block(device: torch.device) -> None:
    chain = chain_of(3, device)
    x = torch.zeros(2**19, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert nodes_of(chain(x)) == 3
    assert nodes_of(chain(x[:100].detach())) == 2


def test_blocks_with_parameters_worth_mentioning_have_a_node_each(device: torch.device) -> None:
    chain = chain_of(12, device)
    chain[4].coupling.f = nn.Linear(2, 2).double().to(device)
    x = torch.randn(3, 4, dtype=torch.float64, device=device)
    assert nodes_of(chain(x)) == 3
    big = revcore.ReversibleBlock(nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2))).double()
    chain[4] = big.to(device)
    assert nodes_of(chain(x)) == 4  # four, one and six after it, which it begins, and the last
    lazy = revcore.ReversibleBlock(nn.LazyLinear(2), nn.Tanh()).double().to(device)
    chain[4] = lazy
    with torch.no_grad():
        chain(x)
    assert nodes_of(chain(x)) == 3


def test_global_hooks_see_every_block(device: torch.device) -> None:
    chain, seen = chain_of(6, device), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        chain(torch.zeros(1, 4, dtype=torch.float64, device=device))
    assert all(block in seen for block in chain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_frozen_prefix_that_ends_amid_a_node(scheme: str, device: torch.device) -> None:
    case = make_case(scheme, "mlp", 6, device)
    chain = case.chain
    chain[:3].requires_grad_(False)
    chain[3].coupling.f.requires_grad_(False)
    runs: list[nn.Module] = []
    branches = [part for block in chain for part in (block.coupling.f, block.coupling.g)]
    for branch in branches:
        branch.register_forward_hook(lambda module, *_: runs.append(module))
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = case.x.detach()
    found = []
    for net in (chain, twin):
        y = net(x)
        y.square().sum().backward()
        found.append({"y": y.detach()} | {name: p.grad for name, p in net.named_parameters()})
    assert_same(*found)
    # What is frozen runs once, and all else twice.
    counts = [runs.count(branch) for branch in branches]
    assert counts == [1] * 7 + [2] * 5


def test_log_determinants_of_a_frozen_prefix(device: torch.device) -> None:
    torch.manual_seed(0)
    chain = revcore.ReversibleSequential(
        *(
            revcore.ReversibleBlock(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), coupling="affine")
            for _ in range(4)
        ),
        log_det=True,
    ).to(device, torch.float64)
    chain[:2].requires_grad_(False)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(3, 4, dtype=torch.float64, device=device)
    found = []
    for net in (chain, twin):
        with revcore.track_drift() as drift:
            z, log_det = net(x)
            (z.square().sum() + log_det.sum()).backward()
        gradients_of = {name: p.grad for name, p in net.named_parameters()}
        found.append({"z": z.detach(), "log_det": log_det.detach()} | gradients_of)
    assert_same(*found)
    assert drift.errors(chain) == []


def test_what_a_call_made_no_use_of_is_not_kept(device: torch.device) -> None:
    chain = chain_of(12, device)
    chain[4].keep_input = True
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    chain(x)
    assert list(chain._groups) == [0, 8, 22]
    chain[4].keep_input = False
    chain(x)
    assert list(chain._groups) == [0, 16, 22]
    with torch.no_grad():
        chain(x)
    assert not chain._groups
