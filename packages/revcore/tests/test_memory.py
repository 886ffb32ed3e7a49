"""Activation memory does not grow with depth, and the means to see it would notice if it did."""

import gc

import pytest
import torch
from cases import SCHEMES, chain_of_branches, make_case
from torch import nn

import revcore


def activations(chain, x):
    """Bytes after forward, and at the peak without what the parameters' gradients take."""
    x = x.clone().requires_grad_()
    for parameter in chain.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that no gradient is new memory for long
    with revcore.track_memory() as memory:
        y = chain(x)
        after_forward = memory.live_bytes
        y.sum().backward()
        del y
    return after_forward, memory.peak_bytes


def chain_of_depth(depth, scheme, device):
    return make_case(scheme, "mlp", depth, device).chain


def wide_input(device):
    return torch.randn(2000, 8, dtype=torch.float64, device=device)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_is_constant_in_depth(scheme, device):
    x = wide_input(device)
    shallow = activations(chain_of_depth(4, scheme, device), x)
    deep = activations(chain_of_depth(64, scheme, device), x)
    assert shallow == deep
    # What stays after forward is the joined output, and nothing beside it.
    assert deep[0] == x.nbytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_that_share_a_node_hold_gradients_a_little_longer(scheme, device, monkeypatch):
    monkeypatch.setattr("revcore.parts._TINY", 2**14)
    monkeypatch.setattr("revcore.parts._STEPS_AT_ONCE", 16)
    x = wide_input(device)
    chain = chain_of_depth(64, scheme, device)
    after_forward, shallow = activations(chain_of_depth(2, scheme, device), x)
    assert activations(chain_of_depth(9, scheme, device), x)[0] == after_forward == x.nbytes
    nine = activations(chain_of_depth(9, scheme, device), x)[1]
    parameters = sum(parameter.nbytes for parameter in chain[:8].parameters())
    assert nine <= shallow + parameters + x.nbytes // 2
    assert activations(chain, x) == (after_forward, nine)


class Token(nn.Module):
    """Appends a parameter to the stream: its gradient is a view of one that is as large."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        return torch.cat([x, self.token]).tanh()[:-1]


class Median(nn.Module):
    """Remembers a view of something large."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        (median,) = revcore.remember(lambda: (x.sort(0).values[len(x) // 2],))
        return self.linear(x - median).tanh()


@pytest.mark.parametrize("branch", [Token, Median])
def test_no_branch_keeps_more_than_it_needs(branch, device):
    x = wide_input(device)
    shallow, deep = (activations(chain_of_branches(branch(), depth).to(x), x) for depth in (4, 32))
    # Parameters, whose gradients a node holds, and medians.
    small = 32 * 2 * (20 + 4) * x.element_size()
    assert small < x.nbytes / 8
    assert deep[0] <= shallow[0] + small
    assert deep[1] <= shallow[1] + small


@pytest.mark.parametrize("reversing", [True, False])
def test_log_determinants_are_added_up_at_once(reversing, device):
    """Of points in the plane one is as large as a stream."""
    x = torch.randn(5000, 2, dtype=torch.float64, device=device)
    peaks = []
    for depth in (4, 32):
        blocks = [revcore.ReversibleBlock(nn.Linear(1, 1), coupling="affine") for _ in range(depth)]
        chain = revcore.ReversibleSequential(*blocks, log_det=True).to(x)
        with revcore.track_memory() as memory, torch.set_grad_enabled(reversing):
            chain(x)
        peaks.append(memory.peak_bytes)
    assert peaks[0] == peaks[1]


def test_a_block_alone_saves_memory(device):
    x = wide_input(device)
    block = chain_of_depth(1, "additive", device)[0]
    assert activations(block, x)[0] == x.nbytes


def test_stored_activations_grow(device):
    x = wide_input(device)
    shallow, deep = (
        activations(revcore.set_reversing(chain_of_depth(d, "additive", device), False), x)
        for d in (4, 64)
    )
    assert deep[0] > 12 * shallow[0]
    assert deep[1] > 12 * shallow[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kept_inputs_cost_what_they_keep(scheme, device):
    x = wide_input(device)
    chain = chain_of_depth(8, scheme, device)
    plain, _ = activations(chain, x)
    for position in (2, 4, 6):
        chain[position].keep_input = True
    kept, _ = activations(chain, x)
    assert kept - plain == 3 * x.nbytes


CALLS = {
    "chain": lambda chain, x: chain(x),
    "chain, recomputed": revcore.recompute,
    "chain in a branch": lambda chain, x: revcore.ReversibleBlock(chain, chain)(x, x)[0],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_lives_on(call, device):
    branches = [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(4)]
    chain = revcore.ReversibleSequential(*map(revcore.ReversibleBlock, branches)).to(device)
    x = torch.randn(6, 8, device=device, requires_grad=True)
    with revcore.track_memory():  # torch imports a part of itself here, which leaves a cycle
        chain(x)
    gc.collect()
    gc.disable()
    try:
        with revcore.track_memory() as memory:
            call(chain, x).square().sum().backward()
            chain.zero_grad()
            x.grad = None
            assert memory.live_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["attribute", "saved tensors", "list of the caller"])
def test_a_hoarder_is_seen(where, device):
    hoard = []

    class Hoarding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x * 2
            if where == "attribute":
                ctx.kept = y.detach()
            elif where == "saved tensors":
                ctx.save_for_backward(y)
            else:
                hoard.append(y.detach())
            return y * 1

        @staticmethod
        def backward(_ctx, grad):
            return grad * 2

    class Hoarder(nn.Module):
        def forward(self, x):
            return Hoarding.apply(x)

    x = wide_input(device)
    grown = []
    for depth in (4, 64):
        net = nn.Sequential(*(Hoarder() for _ in range(depth)))
        grown.append(activations(net, x)[0])
        hoard.clear()
    assert grown[1] > 10 * grown[0]


def test_track_memory_counts_no_views_and_no_tensors_from_outside(device):
    outside = torch.zeros(100, device=device)
    with revcore.track_memory() as memory:
        view = outside.view(10, 10)
        view += 1
        assert memory.live_bytes == 0
        new = outside + 1
        part = new[:10]
        assert memory.live_bytes == 400
        del new
        assert memory.live_bytes == 400
        del part
    assert memory.live_bytes == 0
    assert memory.peak_bytes == 400
