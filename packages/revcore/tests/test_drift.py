"""Drift is measured where it arises, and measuring it changes nothing."""

import copy

import pytest
import torch
from cases import SCHEMES, assert_same, gradients, make_case
from torch import nn

import revcore


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_is_seen_and_changes_nothing(scheme, device):
    case = make_case(scheme, "mlp", depth=4, device=device, dtype=torch.float32)
    twin = case.twin()
    with revcore.track_drift() as drift:
        measured = gradients(case.chain, case.chain, case.x)
    assert_same(measured, gradients(twin, twin, case.x), tolerance=0)
    errors = drift.errors(case.chain)
    assert [error.name for error in errors] == [
        f"{block}.coupling.{branch}" for block in (3, 2, 1, 0) for branch in "gf"
    ]
    worst = drift.worst(case.chain)
    if scheme == "fixed-point":
        assert worst.error == 0
    else:
        assert 0 < worst.error < 1e-4


def test_a_wrong_inverse_is_named():
    class Wrong(nn.Module):
        def forward(self, x):
            return 2 * x

        def inverse(self, y):
            return y / 2 + 0.01

    blocks = [revcore.ReversibleBlock(nn.Linear(4, 4)), Wrong(), revcore.ReversibleBlock(nn.Tanh())]
    chain = revcore.ReversibleSequential(*blocks)
    with revcore.track_drift() as drift:
        chain(torch.randn(3, 8)).sum().backward()
    errors = dict(drift.errors(chain))
    assert errors["2.coupling.f"] < 1e-5
    assert errors["1"] > 1e-3


def test_a_kept_input_restarts_exactly():
    case = make_case("additive", "mlp", depth=4, dtype=torch.float32)
    case.chain[2].keep_input = True
    with revcore.track_drift() as drift:
        case.chain(case.x.requires_grad_()).sum().backward()
    errors = dict(drift.errors(case.chain))
    assert errors["2.coupling.f"] == 0
    assert errors["3.coupling.f"] > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_branches_of_blocks_with_kept_inputs_see_what_they_saw(scheme, device):
    case = make_case(scheme, "mlp", depth=3, device=device, dtype=torch.float32)
    seen = []
    for block in case.chain:
        block.keep_input = True
        for branch in (block.coupling.f, block.coupling.g):
            branch.register_forward_hook(lambda _, x, __: seen.append(x[0].detach().clone()))
    case.chain(case.x.requires_grad_()).sum().backward()
    first, again = seen[:6], seen[6:]
    assert all(map(torch.equal, first, again[::-1]))


def test_nothing_measured_is_an_error():
    chain = make_case("additive", "mlp").chain
    with revcore.track_drift() as drift:
        revcore.set_reversing(copy.deepcopy(chain), False)
    with pytest.raises(ValueError, match="no reversible chain ran forward and backward"):
        drift.worst(chain)


def test_complex_streams(device):
    """Their imaginary parts count, too."""

    class Far(revcore.Coupling):
        def combine(self, a, t):
            return a + t

        def uncombine(self, a, t):
            return a - t + 0.1j

    chain = revcore.ReversibleSequential(Far(nn.Identity(), nn.Identity())).to(device)
    with revcore.track_drift() as drift:
        x = torch.ones(2, 2, dtype=torch.complex64, device=device, requires_grad=True)
        chain(x).abs().sum().backward()
    assert drift.worst(chain).error > 0.03


def test_streams_of_zeros(device):
    """Momentum begins with one, of which any error would be infinitely large."""
    blocks = [revcore.ReversibleBlock(nn.Linear(4, 4)) for _ in range(4)]
    chain = revcore.ReversibleSequential(*blocks).to(device)
    with revcore.track_drift() as drift:
        x = torch.randn(3, 4, device=device, requires_grad=True)
        a, b = chain(x, torch.zeros_like(x))
        (a + b).sum().backward()
    assert 0 < drift.worst(chain).error < 1e-2
