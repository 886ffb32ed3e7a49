"""The fixed-point coupling: the same bits back, and no silent overflow."""

import copy
import gc
import weakref

import pytest
import torch
from cases import fixed_point_chain, loss_of, make_case, mlp, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revcore

BITS = 16


def on_grid(x, bits=BITS):
    return torch.round(x * 2.0**bits) / 2.0**bits


class LowPrecision(nn.Module):
    """A branch whose arithmetic is as coarse as it gets."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x):
        return 5 * torch.tanh(self.linear(x.bfloat16()))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 18)),
    scale=st.floats(1e-6, 3.0),
    seed=st.integers(0, 2**31),
    low=st.booleans(),
)
def test_inverse_gives_the_same_bits(size, scale, seed, low, device):
    depth, bits = size
    torch.manual_seed(seed)
    chain = fixed_point_chain(LowPrecision if low else lambda: mlp(4, 4), depth, bits)
    chain.to(device)
    x = on_grid(scale * torch.randn(5, 8, device=device), bits) + 0.0
    with torch.no_grad():
        y = chain(x)
        assert torch.equal(y, on_grid(y, bits))
        assert torch.equal(chain.inverse(y), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_input_is_rounded_to_the_grid_in_both_modes(dtype, device):
    chain = fixed_point_chain(lambda: mlp(4, 4), 2).to(device, dtype)
    x = torch.randn(5, 8, device=device, dtype=dtype)
    assert not torch.equal(x, on_grid(x))
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing)
        assert same_bits(chain(x).detach(), chain(on_grid(x)).detach())
        assert torch.equal(chain.inverse(chain(x)), on_grid(x))


def test_gradients_are_those_of_the_additive_coupling(device):
    """Where rounding changes nothing: on inputs and branch outputs that are on the grid."""
    f, g = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    for branch in (f, g):
        branch.weight.data.copy_(torch.randint(-3, 3, (4, 4)))
    fixed = revcore.ReversibleBlock(f, g, "fixed_point").to(device)
    additive = copy.deepcopy(revcore.ReversibleBlock(f, g)).to(device)
    x = torch.randint(-9, 9, (5, 8), device=device).float().requires_grad_()
    fixed(x).square().sum().backward()
    grad, x.grad = x.grad, None
    additive(x).square().sum().backward()
    assert torch.equal(grad, x.grad)
    for a, b in zip(fixed.parameters(), additive.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("around_backward", [False, True])
def test_hooks_on_saved_tensors_keep_nothing_alive(around_backward, device):
    packed = []

    def pack(x):
        packed.append(weakref.ref(x))
        return x

    chain = make_case("fixed-point", "mlp", device=device, dtype=torch.float32).chain
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks:
        loss = loss_of(chain(torch.randn(5, 8, device=device)))
        if around_backward:
            loss.backward()
    if not around_backward:
        loss.backward()
    del loss
    gc.collect()
    alive = [x() for x in packed if x() is not None]
    assert packed
    assert all(any(x is p for p in chain.parameters()) for x in alive)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.aux, self.table = nn.Linear(4, 4), None, {}

    def forward(self, x):
        x = self.linear(x).tanh()
        self.aux = self.table["aux"] = x.square().mean()
        return x


@pytest.mark.parametrize("scheme", ["additive", "fixed_point"])
def test_a_result_in_an_attribute_has_no_graph_of_the_first_run(scheme, device):
    block = revcore.ReversibleBlock(Auxiliary(), coupling=scheme)
    chain = revcore.ReversibleSequential(block).to(device)
    chain(torch.randn(5, 8, device=device, requires_grad=True))
    f = block.coupling.f
    assert not f.aux.requires_grad
    assert not f.table["aux"].requires_grad
    assert f.aux > 0


@pytest.mark.parametrize("reversing", [True, False])
@pytest.mark.parametrize("cause", ["input", "branch", "not finite"])
def test_overflow_is_an_error(reversing, cause, device):
    chain = fixed_point_chain(lambda: nn.Linear(4, 4), 3).to(device)
    revcore.set_reversing(chain, reversing)
    x = torch.ones(2, 8, device=device)
    if cause == "input":
        x[1, 3] = 300.0
    else:
        chain[1].g.bias.data[2] = 300.0 if cause == "branch" else float("nan")
    with pytest.raises(OverflowError, match=r"reached (\d{3}\S*|nan), .*must stay below 256"):
        chain(x)
    # Halved in the next step, an overflow is still one.
    if cause == "branch":
        chain[2].g.bias.data[2] = -300.0
        with pytest.raises(OverflowError):
            chain(x)


def test_an_input_may_be_too_large_if_the_sum_fits(device):
    chain = fixed_point_chain(lambda: nn.Linear(4, 4), 1).to(device)
    nn.init.constant_(chain[0].f.bias, -100.0 - 2.0**-16)
    stored = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(2, 8, device=device)
    x[1, 3] = 300.0
    for net in (chain, stored):
        net(x).square().sum().backward()
    for ours, theirs in zip(chain.parameters(), stored.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    with pytest.raises(OverflowError, match="reached 300"):
        chain.inverse(chain(x))


def test_dtypes_without_a_grid_are_refused():
    chain = fixed_point_chain(lambda: nn.Linear(4, 4), 1)
    with pytest.raises(TypeError, match=r"all float64, got torch.bfloat16: call x.float()"):
        chain(torch.randn(2, 8, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"all float32 or all float64, got torch\.float64"):
        chain(torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4))


def test_fraction_bits_that_are_set_later():
    coupling = revcore.FixedPointCoupling(nn.Identity(), nn.Identity())
    coupling.fraction_bits = 22
    with pytest.raises(OverflowError, match=r"fraction_bits=22.*must stay below 4\."):
        coupling(torch.full((2, 8), 3.0))


@pytest.mark.parametrize("bits", [0, 53, -1, 16.5])
def test_fraction_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="fraction_bits"):
        revcore.FixedPointCoupling(nn.Identity(), nn.Identity(), fraction_bits=bits)


@pytest.mark.parametrize("reversing", [True, False])
def test_one_chain_has_one_grid(reversing):
    def block(coupling):
        return revcore.ReversibleBlock(nn.Linear(4, 4), coupling=coupling)

    def fine(f, g, split_dim=1):
        return revcore.FixedPointCoupling(f, g, split_dim, fraction_bits=18)

    for couplings in (
        ["fixed_point", "additive"],
        ["affine", "fixed_point"],
        ["fixed_point", fine],
    ):
        chain = revcore.ReversibleSequential(*map(block, couplings))
        revcore.set_reversing(chain, reversing)
        with pytest.raises(ValueError, match="mixes fixed-point couplings"):
            chain(torch.randn(2, 8))


def test_branches_run_the_same_graph_both_times(device):
    """With and without gradients, compiled code may compute other bits."""

    class OtherBitsWithoutGradients(nn.Linear):
        def forward(self, x):
            return super().forward(x) + (0 if torch.is_grad_enabled() and x.requires_grad else 1e-3)

    chain = fixed_point_chain(lambda: OtherBitsWithoutGradients(4, 4), 3).to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    results = []
    for module in (chain, twin):
        x = torch.linspace(-1, 1, 48, device=device).view(6, 8).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for ours, stored in zip(*results, strict=True):
        assert torch.equal(ours, stored)


class Outside(nn.Module):
    """Depends on something that no chain can know of."""

    scale = (1.0,)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * self.scale[0]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_other_bits_in_the_second_run_are_an_error(direction, device, monkeypatch):
    chain = fixed_point_chain(Outside, 2).to(device)
    for frozen in (False, True):
        chain[0].requires_grad_(not frozen)
        x = torch.randn(5, 8, device=device, requires_grad=not frozen)
        run = chain if direction == "forward" else chain.inverse
        run(x).sum().backward()
        y = run(x)
        monkeypatch.setattr(Outside, "scale", (1.0 + 1e-3,))
        with pytest.raises(RuntimeError, match="was not reconstructed bit for bit"):
            y.sum().backward()
        monkeypatch.undo()
