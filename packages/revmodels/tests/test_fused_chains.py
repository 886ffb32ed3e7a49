"""In a chain a branch's last convolution adds to the stream, and its first to the gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from batches import batch, relative_error
from torch import nn

import revcore
import revmodels
from revmodels.branches import Branch, make_branch
from revmodels.fused import load

passes = pytest.importorskip("revmodels.passes", reason="there is no Triton", exc_type=ImportError)
pytest.importorskip("numpy", reason="Triton's interpreter needs it")

pytestmark = pytest.mark.usefixtures("kernels")

CONVOLUTIONS = {"basic": 2, "bottleneck": 3}
# Channels of a stream, and of the convolutions inside; 3x3 takes Triton's interpreter long.
WIDTHS = {"basic": (8, 8), "bottleneck": (32, 8)}


def make_chain(device, kind="bottleneck", depth=2, coupling=revcore.AdditiveCoupling):
    torch.manual_seed(0)
    couplings = [coupling(*(make_branch(kind, *WIDTHS[kind]) for _ in "fg")) for _ in range(depth)]
    chain = revcore.ReversibleSequential(*couplings)
    chain.to(device, memory_format=torch.channels_last)
    return revmodels.set_fused(chain, True)


def streams(device, kind="bottleneck"):
    return batch(2, 2 * WIDTHS[kind][0], 4, 4, device=device)


def run(chain, x, dtype=None, *, twice=False):
    """Computes output and gradients; if twice, that of the input in a backward pass of its own."""
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        y = chain(x)
    chain.zero_grad()
    x.grad = grad = None
    if twice:
        (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    y.square().sum().backward()
    grad = x.grad if grad is None else grad
    # In one piece, because some are zero up to rounding.
    return y, grad, torch.cat([parameter.grad.flatten() for parameter in chain.parameters()])


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_chain_reversed_stored_and_without_kernels(device, products, dtype, kind):
    x = streams(device, kind)
    reversed_chain = make_chain(device, kind)
    stored = revcore.set_reversing(copy.deepcopy(reversed_chain), False)
    unfused = revmodels.set_fused(copy.deepcopy(stored), False)
    ours = run(reversed_chain, x, dtype, twice=True)
    # Forward, and both backward passes: a branch's last product goes to a stream. On the way back
    # its first convolution's gradient does.
    branch = [False] * (CONVOLUTIONS[kind] - 1) + [True]
    assert products["convolve"] == branch * 4 * 3
    # 3x3 kernels add to a tensor that lies dense: not to the end of the chain, halves of one.
    backward = branch * 4 if kind == "bottleneck" else [False] * 4 + branch * 2
    assert products["gradients"] == backward * 2
    for found in products.values():
        found.clear()
    theirs = run(stored, x, dtype)
    assert products["convolve"] == branch * 4
    assert not any(products["gradients"])
    plainly = run(unfused, x, dtype)
    assert torch.equal(ours[0], theirs[0])
    rounding = 1e-5 if dtype is None else 0.15
    for one, two, three in zip(ours, theirs, plainly, strict=True):
        assert relative_error(one, two) < rounding
        assert relative_error(two, three) < rounding
    for one, two in zip(reversed_chain.buffers(), stored.buffers(), strict=True):
        assert torch.equal(one, two)


@pytest.fixture
def looked_at(device, monkeypatch):
    """Batches that were read for their statistics."""
    load("passes", device.type)  # which compares the kernels with torch
    found, sum_up = [], passes._sum_up
    monkeypatch.setattr(passes, "_sum_up", lambda x: found.append(x) or sum_up(x))
    return found


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
@pytest.mark.parametrize("reversing", [True, False])
def test_a_chain_reads_one_stream_alone_for_statistics(device, looked_at, kind, reversing):
    chain = revcore.set_reversing(make_chain(device, kind), reversing)
    x = streams(device, kind)
    chain(x).square().sum().backward()
    twin = revmodels.set_fused(copy.deepcopy(chain), False)
    y = chain(x)
    assert len(looked_at) == 2
    torch.testing.assert_close(y, twin(x))
    for ours, theirs in zip(chain.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_fixed_point_chain_has_the_bits_of_a_stored_one(device, products, dtype, kind):
    chain = make_chain(device, kind, coupling=revcore.FixedPointCoupling)
    stored = revcore.set_reversing(copy.deepcopy(chain), False)
    unfused = revmodels.set_fused(copy.deepcopy(stored), False)
    x = streams(device, kind)
    ours = run(chain, x, dtype)
    assert products["convolve"].count(True) == 4 * 2
    assert True in products["gradients"]
    for one, two in zip(ours, run(stored, x, dtype), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(ours, run(unfused, x, dtype), strict=True):
        assert relative_error(one, two) < (1e-4 if dtype is None else 0.15)


@pytest.mark.parametrize("reversing", [True, False])
def test_an_overflow_is_seen(device, products, reversing):
    chain = make_chain(device, coupling=revcore.FixedPointCoupling)
    revcore.set_reversing(chain, reversing)
    x = streams(device)
    chain(x)
    chain[1].g.convs[-1].weight.data.mul_(1e4)
    with pytest.raises(OverflowError, match="a stream reached inf"):
        chain(x)
    chain[1].g.convs[-1].weight.data.fill_(torch.nan)
    with pytest.raises(OverflowError, match="a stream reached inf"):
        chain(x)
    assert products["convolve"].count(True) == 4 * 3


@pytest.mark.parametrize("scheme", [revcore.AdditiveCoupling, revcore.FixedPointCoupling])
def test_the_inverse(device, products, scheme):
    chain, x = make_chain(device, coupling=scheme), streams(device)
    x = torch.round(x.detach() * 2**16) / 2**16
    chain(x)
    chain.eval()
    products["convolve"].clear()
    with torch.no_grad():
        y = chain(x)
        assert products["convolve"] == [False, False, True] * 4
        back = chain.inverse(y)
        assert products["convolve"] == [False, False, True] * 8
        assert relative_error(back, x) < 1e-5
        assert scheme is revcore.AdditiveCoupling or torch.equal(back, x)
    # With gradients, too: they are those of a subtraction.
    chain.train()
    x.requires_grad_()
    stored = revcore.set_reversing(copy.deepcopy(chain), False)
    unfused = revmodels.set_fused(copy.deepcopy(chain), False)
    products["convolve"].clear()
    found = []
    for net in (chain, stored, unfused):
        loss = net.inverse(x).square().sum()
        found.append(torch.autograd.grad(loss, (x, *net.parameters())))
    assert products["convolve"].count(True) == 4 * 3
    for ours, theirs, plainly in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-4
        assert relative_error(theirs, plainly) < 1e-4


class Twice(Branch):
    def forward(self, x):
        return 2 * super().forward(x)


def twice(chain):
    for module in chain.modules():
        if type(module) is Branch:
            module.__class__ = Twice


def hooked(chain):
    for module in chain.modules():
        if type(module) is Branch:
            module.register_forward_hook(lambda _, __, y: 2 * y)


def wrapped(chain):
    for module in list(chain.modules()):
        if isinstance(module, revcore.AdditiveCoupling):
            module.f, module.g = nn.Sequential(module.f), nn.Sequential(module.g)


class Doubling(revcore.AdditiveCoupling):
    def combine(self, a, t):
        return a + 2 * t

    def uncombine(self, a, t):
        return a - 2 * t

    def combine_vjp(self, a, t, grad):
        return grad, 2 * grad


def doubling(chain):
    for module in chain.modules():
        if isinstance(module, revcore.AdditiveCoupling):
            module.__class__ = Doubling


@pytest.mark.parametrize("change", [twice, hooked, wrapped, doubling])
def test_a_stream_is_not_for_results_that_something_changes(device, products, change):
    x, chain = streams(device), make_chain(device, depth=1)
    change(chain)
    unfused = revmodels.set_fused(revcore.set_reversing(copy.deepcopy(chain), False), False)
    ours = run(chain, x)
    assert products["convolve"]
    assert True not in products["convolve"] + products["gradients"]
    for one, two in zip(ours, run(unfused, x), strict=True):
        assert relative_error(one, two) < 1e-5


@pytest.mark.parametrize("make", [revmodels.ResNet, revmodels.RevNet])
@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_a_net_computes_what_it_computes_without_kernels(device, products, kind, make):
    torch.manual_seed(0)
    net = make(kind, (2, 2), (8, 8, 16), 5)
    net.to(device, memory_format=torch.channels_last)
    twin = copy.deepcopy(net)
    x, labels = batch(4, 3, 4, 4, device=device).detach(), torch.arange(4, device=device)
    for one in (revmodels.set_fused(net, True), twin):
        F.cross_entropy(one(x), labels).backward()
    # Branches of ordinary blocks add to the shortcut, those of a chain to a stream.
    added = products["convolve"].count(True)
    assert added == 4 if make is revmodels.ResNet else added > 4
    grads = [torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (net, twin)]
    assert relative_error(*grads) < 1e-4
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
