"""What would be wrong in silence, because nothing in a branch or around it says so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import traceable
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import revcore


def make_chain(branch, blocks=2):
    chain = revcore.ReversibleSequential(
        *(revcore.ReversibleBlock(copy.deepcopy(branch)) for _ in range(blocks))
    )
    return chain.double()


def step(chain, x, **kwargs):
    """Runs forward and backward; returns the output and all gradients."""
    chain.zero_grad()
    x = x.detach().requires_grad_()
    y = chain(x, **kwargs)
    y.square().sum().backward()
    return y, [x.grad, *(p.grad for p in chain.parameters())]


def same(one, two):
    return all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(one, two, strict=True))


def stored(chain):
    return revcore.set_reversing(copy.deepcopy(chain), False)


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(6, 8, dtype=torch.float64, device=device)


class ReZero(revcore.AdditiveCoupling):
    """Has a parameter of its own, outside of its branches."""

    def __init__(self, f, g, split_dim=1):
        super().__init__(f, g, split_dim)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def combine(self, a, t):
        return a + self.alpha * t

    def uncombine(self, a, t):
        return a - self.alpha * t


class LearnedScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, t):
        return torch.exp(self.log_scale + 0.1 * t.tanh()), t


def with_own_parameters():
    return {
        "coupling": ReZero(nn.Linear(4, 4), nn.Linear(4, 4)),
        "adapter": revcore.AffineCoupling(nn.Linear(4, 4), nn.Linear(4, 4), adapter=LearnedScale()),
    }


@pytest.mark.parametrize("kind", ["coupling", "adapter"])
def test_parameters_of_a_coupling_are_refused(device, x, kind):
    chain = revcore.ReversibleSequential(with_own_parameters()[kind]).double().to(device)
    with pytest.raises(RuntimeError, match=r"the coupling .* would get no gradient"):
        step(chain, x)
    own = [p for name, p in chain.named_parameters() if "alpha" in name or "log_scale" in name]
    _, found = step(revcore.set_reversing(chain, False), x)
    assert own
    assert None not in found
    for parameter in own:
        parameter.requires_grad_(False)
    _, right = step(chain, x)
    _, found = step(revcore.set_reversing(chain, True), x)
    assert same([g for g in found if g is not None], [g for g in right if g is not None])


class Halved(revcore.AdditiveCoupling):
    """Changes the arithmetic alone: the gradients and the volume are not those that it inherits."""

    def combine(self, a, t):
        return a / 2 + t.sin()

    def uncombine(self, a, t):
        return 2 * (a - t.sin())


def test_a_subclass_with_other_arithmetic(device, x):
    chain = revcore.ReversibleSequential(Halved(nn.Linear(4, 4), nn.Linear(4, 4))).double()
    chain.to(device)
    assert same(step(chain, x)[1], step(stored(chain), x)[1])
    y = chain(x.detach().requires_grad_())
    assert torch.allclose(chain.inverse(y), x)
    measured = revcore.ReversibleSequential(chain[0], log_det=True)
    with pytest.raises(TypeError, match="Halved has no log-determinant"):
        measured(x)


@traceable
@pytest.mark.parametrize("kind", ["coupling", "adapter"])
def test_parameters_of_a_coupling_are_refused_compiled(x, kind):
    torch.compiler.reset()
    chain = revcore.ReversibleSequential(with_own_parameters()[kind]).double().to(x.device)
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="would get no gradient"):
        compiled(x.requires_grad_())


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass, as other libraries have them."""


class ByHand(nn.Module):
    """Statistics that F.batch_norm changes, which it does not count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("spread", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.spread, training=True)


class Smoothed(nn.Module):
    """A buffer that is changed behind the version counter, and read."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(4))

    def forward(self, x):
        self.center.data.mul_(0.5).add_(x.detach().mean(0))
        return (x - self.center).tanh()


@pytest.mark.parametrize("layer", [lambda: OwnBatchNorm(4), ByHand, Smoothed])
def test_buffers_that_change_uncounted(device, x, layer):
    chain = make_chain(nn.Sequential(nn.Linear(4, 4), layer())).to(device)
    twin = stored(chain)
    for _ in range(3):
        assert same(step(chain, x)[1], step(twin, x)[1])
    for one, two in zip(chain.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(one, two)


class Gated(nn.Module):
    """Uses a tensor that is neither its own nor an argument."""

    def __init__(self, gate):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gate = [gate]

    def forward(self, x):
        return self.linear(x) * self.gate[0]


def test_a_foreign_tensor_that_requires_a_gradient_later(device, x):
    gate = torch.rand(4, dtype=torch.float64, device=device)
    chain = make_chain(nn.Identity()).to(device)
    chain[0].coupling.f = Gated(gate).double().to(device)
    step(chain, x)
    gate.requires_grad_()
    with pytest.raises(RuntimeError, match="would get no gradient"):
        step(chain, x)


class Constant(nn.Module):
    """Returns a tensor that it holds, whatever comes in."""

    def __init__(self, value):
        super().__init__()
        self.value = value if isinstance(value, nn.Parameter) else [value]

    def forward(self, _x):
        return self.value if isinstance(self.value, nn.Parameter) else self.value[0]


def test_a_foreign_tensor_that_a_branch_returns(device, x):
    value = torch.rand(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    chain = make_chain(nn.Identity()).to(device)
    chain[0].coupling.f = Constant(value)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        step(chain, x)
    chain[0].coupling.f = Constant(nn.Parameter(value))
    ours, theirs = step(chain, x), step(stored(chain), x)
    assert torch.equal(ours[0], theirs[0])
    assert same(ours[1], theirs[1])


def test_a_foreign_tensor_of_a_frozen_branch(device, x):
    gate = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)
    branch = Gated(gate).double().to(device).requires_grad_(False)
    chain = revcore.ReversibleSequential(
        revcore.AdditiveCoupling(branch, nn.Linear(4, 4).double().to(device))
    )
    a, b = x.chunk(2, 1)
    outputs = chain(a.detach().requires_grad_(), b.detach())
    with pytest.raises(RuntimeError, match="would get no gradient"):
        sum(y.sum() for y in outputs).backward()


@traceable
@pytest.mark.parametrize("branch", [Gated, Constant])
def test_a_foreign_tensor_compiled(x, branch):
    torch.compiler.reset()
    tensor = torch.rand(6, 4, dtype=torch.float64, device=x.device, requires_grad=True)
    chain = make_chain(nn.Linear(4, 4)).to(x.device)
    chain[1].coupling.g = branch(tensor).double().to(x.device)
    with pytest.raises(Exception, match="would get no gradient"):
        torch.compile(chain, backend="aot_eager", fullgraph=True)(x.requires_grad_())


def test_a_module_that_is_replaced_before_backward(device, x):
    chain = make_chain(nn.Sequential(nn.Linear(4, 4), nn.Tanh())).to(device)
    step(chain, x)
    _, expected = step(stored(chain), x)
    parameters = list(chain.parameters())
    y = chain(x.requires_grad_())
    chain[0].coupling.f[0] = nn.Linear(4, 4).double().to(device)
    found = torch.autograd.grad(y.square().sum(), [x, *parameters])
    assert same(found, expected)
    assert chain[0].coupling.f[0].weight is not parameters[0]
    assert same(step(chain, x)[1], step(stored(chain), x)[1])


@pytest.mark.parametrize("before", [True, False])
def test_a_forward_that_is_patched(device, x, before):
    chain = make_chain(nn.Linear(4, 4)).to(device)
    if not before:
        step(chain, x)
    for module in chain.modules():
        if isinstance(module, nn.Linear):
            own = module.forward
            module.forward = lambda x, own=own: F.dropout(own(x), 0.5)
    torch.manual_seed(1)
    _, found = step(chain, x)
    torch.manual_seed(1)
    _, right = step(revcore.set_reversing(chain, False), x)
    assert same(found, right)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_weights_that_parametrize_caches(device, x):
    chain = make_chain(nn.Linear(4, 4)).to(device)
    for block in chain:
        for linear in (block.coupling.f, block.coupling.g):
            parametrize.register_parametrization(linear, "weight", Doubled())
    _, right = step(stored(chain), x)
    with parametrize.cached():
        _, found = step(chain, x)
    assert same(found, right)


def test_orthogonal_weights_that_parametrize_caches(device, x):
    chain = make_chain(nn.Linear(4, 4)).to(device)
    for block in chain:
        for linear in (block.coupling.f, block.coupling.g):
            orthogonal(linear)
    with parametrize.cached():
        _, right = step(stored(chain), x)
    with parametrize.cached():
        _, found = step(chain, x)
    assert same(found, right)


def test_parametrizations_with_state_that_parametrize_caches(device, x):
    chain = make_chain(nn.Linear(4, 4)).to(device)
    for block in chain:
        for linear in (block.coupling.f, block.coupling.g):
            spectral_norm(linear)
    twin = stored(chain)
    plain = copy.deepcopy(chain)

    def loop(x):
        a, b = x.chunk(2, 1)
        for block in plain:
            a = a + block.coupling.f(b)
            b = b + block.coupling.g(a)
        return torch.cat((a, b), 1)

    with parametrize.cached():
        right = [loop(x), loop(2 * x)]
    with parametrize.cached():
        found = [twin(x), twin(2 * x)]  # a cached weight is computed once, and so is its state
    torch.testing.assert_close(found, right)
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"Leave cached\(\) away"):
        chain(x.requires_grad_())
    assert not parametrize._cache_enabled
    chain.eval()(x).sum().backward()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, p=0.0):
        return F.dropout(self.linear(x), p)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale):
        return scale * self.linear(x)


@traceable
def test_arguments_that_are_no_tensors_compiled(x):
    torch.compiler.reset()
    chain = make_chain(Noisy()).to(x.device)
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    assert torch.allclose(compiled(x), chain(x))
    with pytest.raises(Exception, match="random numbers"):
        compiled(x, p=0.5)
    chain = make_chain(Scaled()).to(x.device)
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert same(step(compiled, x, scale=0.5)[1], step(chain, x, scale=0.5)[1])


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = []

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda grad: self.calls.append(1) or grad / 2)
        return self.linear(x)


def test_a_hook_of_a_branch_on_its_input(device, x):
    chain = make_chain(Hooked()).to(device)
    twin = stored(chain)
    # A stream's own gradient, which is not that of a branch's input, is not halved.
    assert same(step(chain, x)[1], step(twin, x)[1])
    for one, two in zip(chain.modules(), twin.modules(), strict=True):
        if isinstance(one, Hooked):
            assert len(one.calls) == len(two.calls) == 1
