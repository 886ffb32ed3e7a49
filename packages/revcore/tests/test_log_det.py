"""The log-determinant of a chain: that of the Jacobian, differentiable, in constant memory."""

import copy
from functools import partial

import pytest
import torch
from cases import SCHEMES, assert_same, make_case, traceable
from torch import nn

import revcore


class Mix(nn.Module):
    """Glow's invertible 1x1 convolution."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width) + 0.2 * torch.randn(width, width))

    def forward(self, x):
        return torch.einsum("nc...,cd->nd...", x, self.weight)

    def inverse(self, y):
        return torch.einsum("nc...,cd->nd...", y, torch.linalg.inv(self.weight))

    def log_det(self, x):
        return torch.linalg.slogdet(self.weight)[1] * x[0, 0].numel()


class Bend(nn.Module):
    """Bends each element; how much its volume changes depends on the data."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return torch.sinh(self.scale * x)

    def inverse(self, y):
        return torch.asinh(y) / self.scale

    def log_det(self, x):
        return (self.scale * torch.cosh(self.scale * x)).log().flatten(1).sum(1)


class Squeeze(nn.Module):
    """Moves pixels to channels."""

    def forward(self, x):
        return nn.functional.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return nn.functional.pixel_shuffle(y, 2)

    def log_det(self, x):
        return x.new_zeros(len(x))


def flow(kind, device, *, keep=False):
    """A chain of couplings of all kinds and of modules, and an input for it."""
    if kind == "images":
        conv = [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()) for _ in range(4)]
        wide = [nn.Sequential(nn.Conv2d(8, 16, 1), nn.Tanh()) for _ in range(2)]
        blocks = [
            revcore.ReversibleBlock(conv[0], conv[1], "affine"),
            Mix(4),
            Squeeze(),
            revcore.AffineCoupling(*wide, adapter=revcore.bounded_adapter),
            Bend(),
        ]
        x = torch.randn(2, 4, 2, 4)
    else:
        linear = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(6)]
        inner = revcore.ReversibleSequential(revcore.AffineCoupling(*linear[:2]), Bend())
        blocks = [
            inner,
            revcore.AdditiveCoupling(*linear[2:4]),
            Mix(6),
            revcore.ReversibleBlock(*linear[4:6], "affine"),
        ]
        x = torch.randn(4, 6)
    for block in blocks:
        if isinstance(block, revcore.ReversibleBlock):
            block.keep_input = block.keep_input_inverse = keep
    chain = revcore.ReversibleSequential(*blocks, log_det=True).to(device, torch.float64)
    return chain, x.to(device, torch.float64)


def by_jacobian(function, x):
    """The log-determinant of each sample, from autograd's Jacobian."""

    def alone(sample):
        return function(sample[None])[0].flatten()

    jacobians = [torch.autograd.functional.jacobian(alone, sample) for sample in x]
    return torch.stack([torch.linalg.slogdet(j.flatten(1))[1] for j in jacobians])


def step(module, call, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    z, log_det = call(x)
    (
        z.square().sum() / 2 - (log_det * torch.linspace(0.5, 1.5, len(x)).to(x)).sin().sum()
    ).backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"z": z.detach(), "log_det": log_det.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("kind", ["images", "vectors"])
@pytest.mark.parametrize("reversing", [True, False])
def test_it_is_that_of_the_jacobian(kind, reversing, device):
    chain, x = flow(kind, device)
    revcore.set_reversing(chain, reversing)
    z, log_det = chain(x)
    torch.testing.assert_close(log_det, by_jacobian(chain, x))
    back, inverse = chain.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -log_det)
    torch.testing.assert_close(inverse, by_jacobian(chain.inverse, z))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_one(scheme, device):
    case = make_case(scheme, "conv2d", 2, device)
    chain = revcore.ReversibleSequential(*case.chain.eval(), log_det=True)
    x = case.x[:2, :, :2, :2]
    torch.testing.assert_close(chain(x)[1], by_jacobian(chain, x))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["images", "vectors"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_its_gradients_are_those_of_storing(kind, direction, keep, device):
    chain, x = flow(kind, device, keep=keep)
    if direction == "inverse":
        x = chain(x)[0].detach()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    ours, stored = (step(m, getattr(m, direction), x) for m in (chain, twin))
    assert_same(ours, stored)


def test_its_gradients_are_those_of_plain_autograd(device):
    """Of the determinant that is computed from a Jacobian, no line of which is ours."""
    chain, x = flow("vectors", device)
    plain = copy.deepcopy(chain)

    def by_hand(x):
        (first, bend), second, mix, third = plain
        for part in (first, bend, second, mix, third.coupling):
            if isinstance(part, (Mix, Bend)):
                x = part(x)
                continue
            a, b = x.chunk(2, 1)
            for branch in (part.f, part.g):
                t = branch(b)
                a = a + t if isinstance(part, revcore.AdditiveCoupling) else a * t.exp() + t
                a, b = b, a
            x = torch.cat((a, b), 1)
        return x

    def with_determinant(x):
        jacobians = torch.func.vmap(torch.func.jacrev(lambda s: by_hand(s[None])[0]))(x)
        return by_hand(x), torch.linalg.slogdet(jacobians)[1]

    assert_same(step(chain, chain, x), step(plain, with_determinant, x))


@traceable
@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_compiled(kind, device):
    chain, x = flow(kind, device)
    torch.compiler.reset()
    run = torch.compile(chain, backend="aot_eager_decomp_partition", fullgraph=True)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    assert_same(step(chain, run, x), step(twin, twin, x))


def test_memory_does_not_grow_with_depth(device):
    def kept(depth):
        couplings = [revcore.AffineCoupling(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(depth)]
        chain = revcore.ReversibleSequential(*couplings, log_det=True).to(device)
        x = torch.randn(256, 16, device=device)
        with revcore.track_memory() as memory:
            output = chain(x)
            live = memory.live_bytes
        assert output[1].requires_grad
        return live

    assert kept(2) == kept(16)


def test_streams_in_streams_out_and_changes_in_place(device):
    chain, x = flow("vectors", device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)

    def run(module):
        def call(x):
            *z, log_det = module(*x.split(3, 1))
            log_det += 3  # as a prior is added
            return torch.cat(z, 1), log_det

        return call

    ours = step(chain, run(chain), x)
    assert_same(ours, step(twin, run(twin), x))
    torch.testing.assert_close(ours["log_det"], chain(x)[1] + 3)


@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_of_one_of_both(used, device):
    chain, x = flow("images", device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for module in (chain, twin):
        module(x)[used].sin().sum().backward()
    for a, b in zip(chain.parameters(), twin.parameters(), strict=True):
        expected = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(torch.zeros_like(a) if a.grad is None else a.grad, expected)


def test_an_empty_chain_and_one_that_keeps_volumes(device):
    coupling = revcore.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
    for blocks in ((), (coupling,)):
        chain = revcore.ReversibleSequential(*blocks, log_det=True).to(device)
        z, log_det = chain(torch.randn(3, 4, device=device))
        assert torch.equal(log_det, torch.zeros(3, device=device))
        z.sum()


class Unknown(nn.Module):
    def forward(self, x):
        return 2 * x

    def inverse(self, y):
        return y / 2


class Doubling(revcore.Coupling):
    def combine(self, a, t):
        return 2 * a + t

    def uncombine(self, a, t):
        return (a - t) / 2


def test_blocks_without_one_are_refused():
    for block in (Unknown(), Doubling(nn.Linear(2, 2), nn.Linear(2, 2))):
        chain = revcore.ReversibleSequential(block, log_det=True)
        with pytest.raises(TypeError, match=rf"{type(block).__name__}.* has no log-determinant"):
            chain(torch.randn(3, 4))
    inner = revcore.ReversibleSequential(log_det=True)
    with pytest.raises(ValueError, match="the chain needs log_det=True too"):
        revcore.ReversibleSequential(inner)


def test_the_check_looks_at_such_chains_too(device):
    chain, x = flow("vectors", device)
    assert revcore.check_invertible(chain, x)
    assert chain.log_det
    with revcore.track_drift() as drift:
        chain(x)[0].sum().backward()
    assert drift.worst(chain).error < 1e-9


class Conditional(Bend):
    """Bends by what a condition says, in more precision than its input has, as autocast sums."""

    def forward(self, x, condition):
        return super().forward(x * condition)

    def inverse(self, y, condition):
        return super().inverse(y) / condition

    def log_det(self, x, condition):
        found = super().log_det(x.double() * condition)
        return found + x[0].numel() * condition.double().log()[:, 0] + 1e5


@pytest.mark.parametrize("reversing", [True, False])
def test_arguments_of_an_invertible_module(reversing, device):
    chain = revcore.ReversibleSequential(Conditional(), Conditional(), log_det=True).to(device)
    revcore.set_reversing(chain, reversing)
    x = torch.randn(5, 4, device=device, requires_grad=True)
    condition = torch.rand(5, 1, device=device).add(0.5).requires_grad_()
    z, log_det = chain(x, condition=condition)
    assert (z.dtype, log_det.dtype) == (torch.float32, torch.float64)
    y, plain = x, 0.0
    for block in chain:
        plain = plain + block.log_det(y, condition)
        y = block(y, condition)
    torch.testing.assert_close((z, log_det), (y, plain))
    wanted = [x, condition, *chain.parameters()]
    ours = torch.autograd.grad(z.sum() + log_det.sum(), wanted)
    theirs = torch.autograd.grad(y.sum() + plain.sum(), wanted)
    torch.testing.assert_close(ours, theirs)
    back, other = chain.inverse(z.detach(), condition=condition)
    torch.testing.assert_close((back, other), (x, -log_det), rtol=1e-4, atol=1e-4)


def test_a_log_determinant_that_is_constant(device):
    def adapter(t):
        return torch.full_like(t, 2.0), t

    block = revcore.ReversibleBlock(
        nn.Linear(4, 4), coupling=partial(revcore.AffineCoupling, adapter=adapter)
    )
    chain = revcore.ReversibleSequential(block, log_det=True).to(device)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    found = []
    for reversing in (True, False):
        z, log_det = revcore.set_reversing(chain, reversing)(x)
        found.append(torch.autograd.grad(z.square().sum() + log_det.sum(), x)[0])
    torch.testing.assert_close(*found)
