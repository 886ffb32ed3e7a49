"""A branch that adds its results to the streams by itself changes only where that happens."""

import copy

import pytest
import torch
from cases import Log, traceable
from torch import nn

import revcore
from revcore import get_destination


class AddTo(torch.autograd.Function):
    """Adds to a stream; while that is being reconstructed the gradient is that of the result."""

    @staticmethod
    def forward(ctx, t, stream, to):
        ctx.sign = 1 if to.reconstructs else to.sign
        if to.grid is not None:
            t = torch.round(t * 2**to.grid) / 2**to.grid
        new = stream + to.sign * t
        if (peak := to.peak) is not None and not bool((new.abs() < 2 ** (53 - to.grid)).all()):
            peak.fill_(torch.inf)
        return new

    @staticmethod
    def backward(ctx, grad):
        return ctx.sign * grad, grad, None


class Enter(torch.autograd.Function):
    """Does nothing to the input, and adds its gradient to that of the stream."""

    @staticmethod
    def forward(ctx, x, destination):
        ctx.destination = destination
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if (other := ctx.destination.gradient) is not None:
            ctx.destination.gradient_added = True
            grad = grad + other
        return grad, None


class Adding(nn.Module):
    adds = True

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.seen = Log()

    def compute(self, x):
        return self.linear(x).tanh()

    def forward(self, x):
        destination = get_destination(self)
        if not torch.compiler.is_compiling():
            self.seen.append(destination and destination.sign)
        if destination is None:
            return self.compute(x)
        self.last = destination
        destination.added = True
        t = self.compute(Enter.apply(x, destination))
        return AddTo.apply(t, destination.stream, destination)


def make_chain(depth=3, coupling=revcore.AdditiveCoupling):
    torch.manual_seed(0)
    couplings = [coupling(Adding(3), Adding(3)) for _ in range(depth)]
    return revcore.ReversibleSequential(*couplings, split_dim=-1).double()


def signs(chain):
    found = []
    for module in chain.modules():
        if isinstance(module, Adding):
            found += module.seen
            module.seen = Log()
    return found


def run(chain, x, wanted=None):
    y = chain(x)
    inputs = [x, *chain.parameters()] if wanted is None else wanted(x, chain)
    return y, *torch.autograd.grad(y.square().sum(), inputs)


@pytest.fixture
def x():
    return torch.randn(5, 6, dtype=torch.float64, requires_grad=True)


SCHEMES = [revcore.AdditiveCoupling, revcore.FixedPointCoupling]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_results_as_adding_outside(x, monkeypatch, scheme):
    chain = make_chain(coupling=scheme)
    stored = revcore.set_reversing(copy.deepcopy(chain), False)
    ours, theirs = run(chain, x), run(stored, x)
    assert signs(chain) == [1, -1] * 6
    assert signs(stored) == [1] * 6
    monkeypatch.setattr(Adding, "adds", False)
    plain = run(stored, x)
    assert signs(stored) == [None] * 6
    for one, two, three in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(two, three)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x, _: [x],
        lambda _, chain: list(chain.parameters()),
        lambda _, chain: list(chain[1].parameters()),
    ],
)
def test_a_part_of_the_gradients(x, wanted, monkeypatch):
    chain = make_chain()
    ours = run(chain, x, wanted)
    monkeypatch.setattr(Adding, "adds", False)
    for one, two in zip(ours, run(chain, x, wanted), strict=True):
        torch.testing.assert_close(one, two)


def test_two_backward_passes_and_a_loss_of_one_stream(x, monkeypatch):
    def both(chain):
        y = chain(x)
        first = torch.autograd.grad(y[:, :3].sum(), [x, *chain.parameters()], retain_graph=True)
        return *first, *torch.autograd.grad(y[:, 3:].square().sum(), [x, *chain.parameters()])

    chain = make_chain()
    ours = both(chain)
    monkeypatch.setattr(Adding, "adds", False)
    for one, two in zip(ours, both(chain), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_inverse(x, monkeypatch, scheme):
    chain = make_chain(coupling=scheme)
    stored = revcore.set_reversing(copy.deepcopy(chain), False)
    y = chain(x.detach()).detach()
    signs(chain)
    torch.testing.assert_close(chain.inverse(y), x.detach(), rtol=0, atol=1e-4)
    assert signs(chain) == [-1] * 6
    ours = run(chain.inverse, y, lambda *_: chain.parameters())
    assert signs(chain) == [-1, 1] * 6
    theirs = run(stored.inverse, y, lambda *_: stored.parameters())
    monkeypatch.setattr(Adding, "adds", False)
    plain = run(stored.inverse, y, lambda *_: stored.parameters())
    for one, two, three in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(two, three)


def test_a_grid_reverses_bit_for_bit(x):
    chain = make_chain(coupling=revcore.FixedPointCoupling)
    entered = torch.round(x.detach() * 2**16) / 2**16
    assert torch.equal(chain.inverse(chain(x.detach())), entered)


@pytest.mark.parametrize("reversing", [True, False])
def test_a_branch_that_finds_an_overflow_says_so(reversing):
    chain = make_chain(coupling=revcore.FixedPointCoupling)
    revcore.set_reversing(chain, reversing)
    for coupling in chain:
        coupling.fraction_bits = 52  # below 2, then
    x = 1.999 * torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    with pytest.raises(OverflowError, match="a stream reached inf"):
        chain(torch.cat((x, -x)))


def test_a_branch_that_does_not_look_for_an_overflow_is_looked_at(x, monkeypatch):
    def add(self, _x):
        destination = get_destination(self)
        destination.added = True
        return destination.stream + 2.0**40

    monkeypatch.setattr(Adding, "forward", add)
    with pytest.raises(OverflowError, match="a stream reached 1"):
        make_chain(coupling=revcore.FixedPointCoupling)(x)


def hooked(module):
    module.register_forward_hook(lambda *_: None)


def backward_hooked(module):
    module.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize("hook", [hooked, backward_hooked])
def test_hooks_see_the_result_of_the_branch(x, hook):
    chain = make_chain(1)
    hook(chain[0].f)
    run(chain, x)
    assert chain[0].f.seen == [None, None]
    assert chain[0].g.seen == [1, -1]


class Doubling(revcore.AdditiveCoupling):
    def combine(self, a, t):
        return a + 2 * t

    def uncombine(self, a, t):
        return a - 2 * t

    def combine_vjp(self, a, t, grad):
        return grad, 2 * grad


class Finer(revcore.FixedPointCoupling):
    """Another class may round in another way."""


@pytest.mark.parametrize("coupling", [Doubling, Finer, revcore.AffineCoupling])
def test_other_schemes_do_not_ask_for_it(x, coupling):
    chain = make_chain(coupling=coupling)
    run(chain, x)
    assert set(signs(chain)) == {None}


def test_a_module_inside_of_the_branch_is_not_the_branch(x):
    coupling = revcore.AdditiveCoupling(nn.Sequential(Adding(3)), Adding(3), split_dim=-1)
    chain = revcore.ReversibleSequential(coupling, split_dim=-1).double()
    run(chain, x)
    assert coupling.f[0].seen == [None, None]
    assert coupling.g.seen == [1, -1]


def test_a_chain_inside_of_a_branch_has_streams_of_its_own(monkeypatch):
    class Outer(Adding):
        def __init__(self):
            super().__init__(6)
            self.inner = make_chain(1)

        def compute(self, x):
            return self.inner(super().compute(x))

    torch.manual_seed(0)
    coupling = revcore.AdditiveCoupling(Outer(), Outer())
    chain = revcore.ReversibleSequential(coupling, split_dim=-1).double()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    ours = run(chain, x)
    assert None not in signs(chain)
    monkeypatch.setattr(Adding, "adds", False)
    for one, two in zip(ours, run(chain, x), strict=True):
        torch.testing.assert_close(one, two)


def test_a_graph_does_not_hold_the_stream(x):
    chain = revcore.set_reversing(make_chain(1), False)
    y = chain(x)
    destination = chain.get_submodule("0.f").last
    assert not hasattr(destination, "stream")
    y.sum().backward()
    assert destination.gradient is None


@traceable
def test_a_compiler_sees_an_addition(x):
    torch.compiler.reset()
    chain = make_chain(1)
    ours = torch.compile(chain, backend="eager", fullgraph=True)(x)
    signs(chain)
    torch.testing.assert_close(ours, chain(x))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_property_tells_whether_a_branch_adds(x, wanted):
    class Sometimes(Adding):
        @property
        def adds(self):
            return wanted

    torch.manual_seed(0)
    width = x.shape[-1] // 2
    branches = [Sometimes(width).to(x) for _ in "fg"]
    chain = revcore.ReversibleSequential(revcore.AdditiveCoupling(*branches), split_dim=-1)
    run(chain, x)
    told = [sign is not None for sign in signs(chain)]
    assert told == [wanted] * len(told)
    assert told
