"""Reversing, storing and keeping inputs compute the same, from the same state dict."""

import copy
import pickle

import pytest
import torch
from cases import KINDS, SCHEMES, Log, assert_same, gradients, make_case
from torch import nn

import revcore


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_has_the_same_bits_in_both_modes(scheme, kind, device):
    case = make_case(scheme, kind, 3, device, torch.float32)
    twin = revcore.set_reversing(case.twin(), False)
    x = case.x.requires_grad_()
    assert torch.equal(case.chain(x), twin(x))
    assert case.chain.state_dict().keys() == twin.state_dict().keys()
    case.chain.load_state_dict(twin.state_dict())
    twin.load_state_dict(case.chain.state_dict())


@pytest.mark.parametrize("keep", [[0], [1], [2], [0, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_kept_inputs_never_change_a_result(keep, direction, device):
    case = make_case("affine-exp", "mlp", 4, device)
    plain = case.twin()
    for position in keep:
        case.chain[position].keep_input = True
        case.chain[position].keep_input_inverse = True
    functions = {"forward": lambda m: m, "inverse": lambda m: m.inverse}
    run = functions[direction]
    assert_same(
        gradients(run(case.chain), case.chain, case.x), gradients(run(plain), plain, case.x)
    )


def test_the_kept_input_of_a_frozen_prefix(device):
    """The first step on the tape is none of the prefix, so what is kept there must not be used."""
    case = make_case("affine-exp", "mlp", 3, device)
    case.chain[0].keep_input = True
    case.chain[0].requires_grad_(False)
    twin = revcore.set_reversing(case.twin(), False)
    for module in (case.chain, twin):
        module(case.x).sin().sum().backward()
    for ours, stored in zip(case.chain[1:].parameters(), twin[1:].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, stored.grad)


def test_a_kept_input_is_exact(device):
    """In bfloat16 reconstruction drifts by percents; a kept input restarts it without error."""

    class Records(nn.Linear):
        seen: list

        def forward(self, x):
            self.seen.append(x.detach().clone())
            return 3 * torch.tanh(super().forward(x))

    def drift(keep_input):
        torch.manual_seed(0)
        branches = [Records(4, 4) for _ in range(8)]
        for branch in branches:
            branch.seen = Log()
        blocks = [revcore.ReversibleBlock(f, g) for f, g in zip(*[iter(branches)] * 2, strict=True)]
        chain = revcore.ReversibleSequential(*blocks).to(device, torch.bfloat16)
        chain[1].keep_input = keep_input
        x = torch.randn(64, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
        chain(x).sum().backward()
        first, second = chain[0].coupling.g.seen  # reads the state just before block 1
        return float((first - second).float().abs().max())

    assert drift(keep_input=False) > 0
    assert drift(keep_input=True) == 0


def test_keep_input_may_change_between_calls(device):
    case = make_case("additive", "mlp", 3, device)
    plain = revcore.set_reversing(case.twin(), False)
    expected = gradients(plain, plain, case.x)
    for flag in (True, False, True):
        case.chain[1].keep_input = flag
        assert_same(gradients(case.chain, case.chain, case.x), expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copier, device):
    case = make_case("affine-exp", "mlp", 2, device)
    case.chain[0].keep_input = True
    case.chain.reversing = False
    other = copier(case.chain)
    assert other[0].keep_input
    assert not other.reversing
    assert_same(gradients(other, other, case.x), gradients(case.chain, case.chain, case.x))


def test_g_is_an_independent_copy():
    f = nn.Linear(4, 4)
    block = revcore.ReversibleBlock(f)
    assert block.coupling.f is f
    assert torch.equal(block.coupling.g.weight, f.weight)
    assert block.coupling.g.weight is not f.weight


def test_slices_share_their_blocks(device):
    case = make_case("additive", "mlp", 4, device)
    front, back = case.chain[:2], case.chain[2:]
    assert front[0] is case.chain[0]
    assert len(back) == 2
    torch.testing.assert_close(back(front(case.x)), case.chain(case.x))


def test_a_coupling_alone_is_plain_autograd(device):
    case = make_case("affine-exp", "mlp", 1, device)
    coupling = case.chain[0].coupling
    x = case.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(coupling(x).sum(), x, create_graph=True)
    assert grad.requires_grad
    torch.testing.assert_close(coupling.inverse(coupling(x)), x)
    y1, y2 = coupling(*x.chunk(2, 1))
    assert torch.equal(torch.cat((y1, y2), 1), coupling(x))


def test_meta_device_then_to_empty(device):
    with torch.device("meta"):
        chain = make_case("additive", "mlp", 2, "meta").chain
        assert chain(torch.empty(3, 8, dtype=torch.float64)).shape == (3, 8)
    chain = chain.to_empty(device=device)
    for parameter in chain.parameters():
        nn.init.normal_(parameter)
    chain(torch.randn(3, 8, dtype=torch.float64, device=device)).sum().backward()


def test_repr_says_what_is_stored():
    chain = make_case("additive", "mlp", 1).chain
    chain[0].keep_input = True
    assert "reversing=True" in repr(chain)
    assert "keep_input=True" in repr(chain)
