"""Other steps than the two of a coupling: invertible modules, more streams, unequal ones."""

import copy
import warnings

import pytest
import torch
from cases import assert_same, gradients, loss_of, mlp
from torch import nn
from torch.nn.utils.prune import random_unstructured

import revcore


class Rotation(nn.Module):
    """An invertible linear map of the channels, as Glow has it, of a parameter of its own."""

    def __init__(self, width):
        super().__init__()
        self.skew = nn.Parameter(0.3 * torch.randn(width, width))
        self.scale = nn.Parameter(torch.randn(width))

    def weight(self):
        return torch.linalg.matrix_exp(self.skew - self.skew.mT) * self.scale.exp()

    def forward(self, x):
        return torch.einsum("nc...,cd->nd...", x, self.weight())

    def inverse(self, y):
        return torch.einsum("nc...,cd->nd...", y, torch.linalg.inv(self.weight()))


class Squeeze(nn.Module):
    """Moves pixels to channels: the shape changes inside of a chain."""

    def forward(self, x):
        return nn.functional.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return nn.functional.pixel_shuffle(y, 2)


def coupling(width):
    conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Tanh())
    return revcore.ReversibleBlock(conv, copy.deepcopy(conv), "affine")


def flow(device):
    """Couplings, rotations and a squeeze, which turns 2 x 2 channels into 2 x 8."""
    blocks = (coupling(2), Rotation(4), coupling(2), Squeeze(), Rotation(16), coupling(8))
    return revcore.ReversibleSequential(*blocks).to(device, torch.float64)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_invertible_modules_in_a_chain(direction, device):
    chain = flow(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    shape = (3, 4, 4, 6) if direction == "forward" else (3, 16, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    functions = [getattr(module, direction) for module in (chain, twin)]
    ours = gradients(functions[0], chain, x)
    assert_same(ours, gradients(functions[1], twin, x))
    back = chain.inverse if direction == "forward" else chain
    torch.testing.assert_close(back(functions[0](x)), x)

    def by_hand(x):
        blocks = list(twin)
        for block in blocks if direction == "forward" else blocks[::-1]:
            x = block(x) if direction == "forward" else block.inverse(x)
        return x

    assert_same(ours, gradients(by_hand, twin, x))


def test_invertible_modules_alone(device):
    """Without a coupling there is nothing to split: any width will do."""
    chain = revcore.ReversibleSequential(*(Rotation(5) for _ in range(3))).to(device).double()
    twin = copy.deepcopy(chain)
    x = torch.randn(4, 5, dtype=torch.float64, device=device)
    plain = nn.Sequential(*twin)
    assert_same(gradients(chain, chain, x), gradients(plain, twin, x))
    torch.testing.assert_close(chain.inverse(chain(x)), x)


class Stretch(nn.Module):
    """Has an inverse that is quick to compute."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x):
        return x * self.log_scale.exp()

    def inverse(self, y):
        return y * (-self.log_scale).exp()


def test_invertible_modules_keep_no_activations(device):
    def live(depth):
        chain = revcore.ReversibleSequential(*(Stretch() for _ in range(depth))).to(device)
        x = torch.randn(512, 8, device=device, requires_grad=True)
        with revcore.track_memory() as memory:
            y = chain(x)
            after_forward = memory.live_bytes
            y.sum().backward()
        weights = sum(p.nbytes for p in chain.parameters())
        return after_forward, memory.peak_bytes - weights  # their gradients

    (shallow, shallow_peak), (deep, deep_peak) = live(4), live(64)
    assert shallow == deep == 512 * 8 * 4
    assert deep_peak <= shallow_peak + 4096


def test_a_chain_of_one_stream_in_another_chain():
    inner = revcore.ReversibleSequential(Rotation(4), Rotation(4))
    chain = revcore.ReversibleSequential(inner, Rotation(4)).double()
    plain = copy.deepcopy(chain)
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = gradients(lambda x: plain[1](plain[0][1](plain[0][0](x))), plain, x)
    assert_same(gradients(chain, chain, x), expected)


def test_an_output_that_cannot_be_split_like_the_input():
    class Narrow(nn.Module):
        def forward(self, x):
            return x[:, :3]

        def inverse(self, y):
            return y

    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(2, 2)), Narrow())
    with pytest.raises(ValueError, match="Narrow made size 3 of size 4"):
        chain(torch.randn(5, 4))


def test_a_module_without_an_inverse_is_refused():
    with pytest.raises(TypeError, match=r"ReversibleBlock\(module\), or give it a method inverse"):
        revcore.ReversibleSequential(nn.Linear(2, 2))


class Ring(revcore.AdditiveCoupling):
    """Additive, over any number of streams: each is changed by a branch that reads the next."""

    def __init__(self, *branches, split_dim=1):
        super().__init__(branches[0], branches[1], split_dim)
        self.more = nn.ModuleList(branches[2:])
        self.streams = len(branches)

    def half_steps(self):
        branches = [self.f, self.g, *self.more]
        return [
            revcore.HalfStep(self, branch, target=i, source=(i + 1) % self.streams)
            for i, branch in enumerate(branches)
        ]


@pytest.mark.parametrize("count", [3, 4])
def test_more_than_two_streams(count, device):
    rings = [Ring(*(mlp(3, 3) for _ in range(count))) for _ in range(3)]
    chain = revcore.ReversibleSequential(*rings).to(device, torch.float64)
    twin = copy.deepcopy(chain)
    x = torch.randn(5, 3 * count, dtype=torch.float64, device=device)

    def plain(x):
        streams = list(x.chunk(count, 1))
        for ring in twin:
            for i, branch in enumerate([ring.f, ring.g, *ring.more]):
                streams[i] = streams[i] + branch(streams[(i + 1) % count])
        return torch.cat(streams, 1)

    assert_same(gradients(chain, chain, x), gradients(plain, twin, x))
    torch.testing.assert_close(chain.inverse(chain(x)), x)
    with pytest.raises(ValueError, match=f"in {count} equal streams"):
        chain(x[:, 1:])
    with pytest.raises(ValueError, match=f"works on {count} streams or more, got {count - 1}"):
        chain(*x.chunk(count, 1)[1:])


@pytest.mark.parametrize("reversing", [True, False])
def test_streams_that_no_block_knows(reversing):
    """As one may pass a mask, or the log-determinant that a flow gave."""
    chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(mlp(4, 4)) for _ in range(2)))
    revcore.set_reversing(chain, reversing)
    a, b, mask = torch.randn(2, 4), torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool)
    for call in (chain, chain.inverse, chain[0], chain[0].coupling):
        with pytest.raises(ValueError, match=r"reads or changes number 2.*pass what is no stream"):
            call(a, b, mask)
    mixed = revcore.ReversibleSequential(Rotation(12), *chain)
    assert len(mixed(a, b, a)) == 3


@pytest.mark.parametrize("scheme", ["additive", "affine"])
def test_streams_of_unequal_sizes(scheme, device):
    blocks = [revcore.ReversibleBlock(mlp(2, 5), mlp(5, 2), scheme) for _ in range(3)]
    chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)

    def join(module):
        return lambda x: torch.cat(module(*x.split([5, 2], 1)), 1)

    x = torch.randn(4, 7, dtype=torch.float64, device=device)
    assert_same(gradients(join(chain), chain, x), gradients(join(twin), twin, x))
    for a, b in zip(chain.inverse(*chain(*x.split([5, 2], 1))), x.split([5, 2], 1), strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_of_one_part_of_an_invertible_module(device):
    chain = flow(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    streams = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, device=device).unbind()
    for module in (chain, twin):
        loss_of(module(*streams)[0]).backward()
    for a, b in zip(chain.parameters(), twin.parameters(), strict=True):
        if b.grad is None:  # the last branch changes the other part alone
            assert a.grad is None or not a.grad.any()
        else:
            torch.testing.assert_close(a.grad, b.grad)


class Drawing(nn.Module):
    """A coupling of somebody's own, whose inverse draws in another order than its forward."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.g = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        a = a + self.f(b)
        return torch.cat((a, b + self.g(a)), 1)

    def inverse(self, y):
        a, b = y.chunk(2, 1)
        b = b - self.g(a)
        return torch.cat((a - self.f(b), b), 1)


class Centering(nn.Module):
    """Goes back by what it has measured on the way there."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean.copy_(x.detach().mean(0))
        return (x - self.mean) * self.scale

    def inverse(self, y):
        return y / self.scale + self.mean


class ActNorm(nn.Module):
    """Is initialized by what comes first, from either side (Glow, section 3.1)."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))
        self.register_buffer("initialized", torch.tensor(False))

    def _initialize(self, bias):
        if not self.initialized:
            self.bias.data.copy_(bias)
            self.initialized.fill_(True)

    def forward(self, x):
        self._initialize(-x.detach().mean(0))
        return x + self.bias

    def inverse(self, y):
        self._initialize(y.detach().mean(0))
        return y - self.bias


@pytest.mark.parametrize("module", [Drawing, Centering, ActNorm])
def test_an_inverse_that_comes_to_its_state_in_another_order(module, device):
    blocks = [revcore.ReversibleBlock(nn.Linear(4, 4)), module(), module()]
    chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for step in range(2):
        x = torch.randn(6, 8, dtype=torch.float64, device=device)
        found = []
        for net in (chain, twin):
            torch.manual_seed(step)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found.append(gradients(net, net, x))
            kept = ["keeps its input" in str(warning.message) for warning in caught]
            assert any(kept) == (net is chain and (module is not ActNorm or step == 0))
        assert_same(*found)
        assert_same(chain.state_dict(), twin.state_dict())


def double(_module, args, *output):
    return 2 * (output or args)[0]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("way", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_change_what_an_invertible_module_gets_or_gives(way, direction, device):
    """Its inverse knows nothing of them."""
    blocks = [revcore.ReversibleBlock(mlp(4, 4)), Stretch(), revcore.ReversibleBlock(mlp(4, 4))]
    chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for net in (chain, twin):
        getattr(net[1], way)(double)
    x = torch.randn(3, 8, dtype=torch.float64, device=device)
    found = []
    for net in (chain, twin):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(gradients(getattr(net, direction), net, x))
        assert any("has a hook" in str(each.message) for each in caught) == (net is chain)
    assert_same(*found)


class Mix(nn.Module):
    """Solves with a weight that a hook computes in the forward pass."""

    def __init__(self, wrap):
        super().__init__()
        self.linear = wrap(nn.Linear(8, 8))

    def forward(self, x):
        return self.linear(x)

    def inverse(self, y):
        return torch.linalg.solve(self.linear.weight, (y - self.linear.bias).T).T


def prune(linear):
    return random_unstructured(linear, "weight", 0.1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, prune])
def test_an_inverse_that_reads_what_a_hook_has_computed(wrap, device):
    chain = revcore.ReversibleSequential(Mix(wrap)).to(device, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, device=device)
    ours = gradients(chain, chain, x)
    assert_same(ours, gradients(revcore.set_reversing(chain, False), chain, x))
    revcore.set_reversing(chain, True)
    with pytest.raises(RuntimeError, match=r"'weight_\w+' of Linear no gradient"):
        chain.inverse(x)
    with torch.no_grad():
        torch.testing.assert_close(chain.inverse(chain(x)), x)


@pytest.mark.parametrize("change", [lambda x: x[:, :4], lambda x: x[:2]])
def test_a_way_back_to_another_shape(change):
    class Cut(nn.Identity):
        def inverse(self, y):
            return change(y)

    chain = revcore.ReversibleSequential(Cut())
    y = chain(torch.randn(3, 8, requires_grad=True))
    with pytest.raises(ValueError, match=r"the way back through Cut gives shape .* given \(3, 8\)"):
        y.sum().backward()
