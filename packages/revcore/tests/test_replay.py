"""The second run of a branch sees what the first one saw, and leaves no trace."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import Log, Mixing, assert_same, gradients, loss_of, make_case
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import revcore


def chain_of(*makers, depth=2, device="cpu", dtype=torch.float64):
    blocks = [
        revcore.ReversibleBlock(nn.Sequential(*(m() for m in makers)), keep_input=False)
        for _ in range(depth)
    ]
    return revcore.ReversibleSequential(*blocks).to(device, dtype)


def both_modes(chain, step):
    """Runs `step(chain)` from the same state, reversing and stored."""
    state = {name: value.clone() for name, value in chain.state_dict().items()}
    results = []
    for enabled in (True, False):
        chain.load_state_dict(state)
        revcore.set_reversing(chain, enabled)
        torch.manual_seed(7)
        results.append(step(chain))
    return results


def linear():
    return nn.Linear(4, 4)


def dropout():
    return nn.Dropout(0.4)


def test_dropout_is_replayed_and_the_generator_left_alone(device):
    chain = chain_of(linear, dropout, nn.Tanh, device=device)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)

    def step(chain):
        result = gradients(chain, chain, x)
        return result | {"next random number": torch.rand(3, device=device)}

    ours, plain = both_modes(chain, step)
    assert_same(ours, plain)


class ForkedDropout(nn.Dropout):
    """Draws, and puts the global generator back where it was, as if it had not."""

    def forward(self, x):
        with torch.random.fork_rng():
            return super().forward(x)


def test_dropout_that_leaves_the_generator_alone_is_replayed(device):
    chain = chain_of(linear, lambda: ForkedDropout(0.4), device=device)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)

    def step(chain):
        torch.rand(3, device=device)
        chain.zero_grad()
        loss = loss_of(chain(x.clone().requires_grad_()))
        torch.rand(5, device=device)
        loss.backward()
        return {name: p.grad.clone() for name, p in chain.named_parameters()}

    assert_same(*both_modes(chain, step))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_dropout_in_both_orders_of_use(order, device):
    chain = chain_of(linear, dropout, device=device)
    xs = [torch.randn(6, 8, dtype=torch.float64, device=device) for _ in range(2)]

    def step(chain):
        chain.zero_grad()
        losses = [loss_of(chain(x)) for x in xs]
        for which in order:
            torch.rand(5, device=device)
            losses[which].backward()
        return {name: p.grad for name, p in chain.named_parameters()}

    ours, plain = both_modes(chain, step)
    assert_same(ours, plain)


def test_dropout_in_a_retained_graph(device):
    chain = chain_of(linear, dropout, device=device)
    x = torch.randn(6, 8, dtype=torch.float64, device=device, requires_grad=True)
    loss = loss_of(chain(x))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.rand(5, device=device)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm1d(4, momentum=None),
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
    ids=["batch", "batch-cumulative", "batch-untracked", "spectral", "weight"],
)
@pytest.mark.parametrize("training", [True, False])
def test_buffers_change_once_a_step(norm, training, device):
    chain = chain_of(norm, nn.Tanh, linear, device=device).train(training)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)

    def two_steps(chain):
        first = gradients(chain, chain, x)
        return {f"first {k}": v for k, v in first.items()} | gradients(chain, chain, x)

    ours, plain = both_modes(chain, two_steps)
    assert_same(ours, plain)


def test_running_instance_norm_and_own_buffers(device):
    class Counts(nn.Module):
        """Scales by how often it has run, in a buffer that it changes in place."""

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            return x * self.calls.clone()

    blocks = [
        revcore.ReversibleBlock(
            nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True), Counts())
        )
        for _ in range(2)
    ]
    chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
    x = torch.randn(3, 8, 5, dtype=torch.float64, device=device)

    def twice(chain):
        return gradients(lambda x: chain(x) + chain(x * 2), chain, x)

    ours, plain = both_modes(chain, twice)
    assert_same(ours, plain)
    assert float(chain[0].coupling.f[1].calls) == 2


def test_flags_changed_between_forward_and_backward(device):
    case = make_case("additive", "conv2d", 2, device)
    twin = case.twin()
    y = case.chain(case.x)
    z = case.plain(case.x, twin)
    case.chain.eval()
    loss_of(y).backward()
    loss_of(z).backward()
    assert not any(module.training for module in case.chain.modules())
    norm = case.chain[0].coupling.f[0]
    assert norm.track_running_stats
    for ours, plain in zip(case.chain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(dtype, backward_inside, device):
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.dtypes = []

        def forward(self, x):
            self.dtypes.append(x.dtype)
            return x

    chain = chain_of(linear, Seen, nn.Tanh, linear, device=device, dtype=torch.float32)
    x = torch.randn(6, 8, device=device)

    def step(chain):
        chain.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            y = chain(x)
            if backward_inside:
                loss_of(y.float()).backward()
        if not backward_inside:
            loss_of(y.float()).backward()
        assert y.dtype == torch.float32  # the streams are not cast
        return {name: p.grad for name, p in chain.named_parameters()} | {"y": y.detach()}

    ours, plain = both_modes(chain, step)
    assert torch.equal(ours["y"], plain["y"])
    for name, expected in plain.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < 2 * torch.finfo(dtype).eps, name
    assert {d for m in chain.modules() if isinstance(m, Seen) for d in m.dtypes} == {dtype}
    assert not torch.is_autocast_enabled(device.type)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("coupling", [Mixing, revcore.AffineCoupling])
def test_arithmetic_of_a_scheme_runs_under_the_same_autocast(coupling, backward_inside, device):
    chain = revcore.ReversibleSequential(
        *(coupling(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in "fg")) for _ in range(4))
    ).to(device)
    x = torch.randn(6, 8, device=device)

    def step(chain):
        chain.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = chain(x)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=backward_inside):
            y.float().square().sum().backward()
        return {name: p.grad for name, p in chain.named_parameters()}

    with revcore.track_drift() as drift:
        ours, plain = both_modes(chain, step)
    # Without the same autocast scales are those of bfloat16, which has eight bits.
    assert drift.worst(chain).error < 1e-5
    for name, expected in plain.items():
        assert (ours[name] - expected).norm() < 1e-2 * expected.norm(), name


def test_a_weight_cast_inside_a_chain_still_gets_its_gradient_outside(device):
    shared = nn.Linear(4, 4).to(device)
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(shared, shared)).to(device)
    x = torch.randn(6, 8, device=device)
    grads = []
    for enabled in (True, False):
        revcore.set_reversing(chain, enabled)
        shared.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = shared(chain(x)[:, :4])
        y.float().sum().backward()
        grads.append(shared.weight.grad)
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


def test_an_exception_in_recomputation_leaves_everything_as_it_was(device):
    class FailsLater(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
            self.failing = Log()

        def forward(self, x):
            x = F.dropout(self.norm(self.spectral(x)), 0.5)
            if self.failing:
                raise FloatingPointError
            return x

    block = revcore.ReversibleBlock(FailsLater()).to(device)
    loss = block(torch.randn(6, 8, device=device)).sum()
    block.eval()
    block.coupling.g.failing.append(True)
    buffers = dict(block.named_buffers())
    values = {name: value.clone() for name, value in buffers.items()}
    random = torch.get_rng_state()
    with pytest.raises(FloatingPointError):
        loss.backward()
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module.training for module in block.modules())
    assert block.coupling.g.norm.track_running_stats
    for name, value in block.named_buffers():
        assert value is buffers[name]
        assert torch.equal(value, values[name])


@pytest.mark.parametrize("parts", ["", "1", "1.coupling.f"])
@pytest.mark.parametrize("before", [True, False])
def test_parameters_that_are_frozen_or_trained_from_after_forward(parts, before, device):
    chain = chain_of(linear, device=device)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)

    def step(chain):
        chain.zero_grad()
        chain.requires_grad_(True)
        chain.get_submodule(parts).requires_grad_(before)
        y = chain(x.clone().requires_grad_())
        chain.get_submodule(parts).requires_grad_(not before)
        loss_of(y).backward()
        return {name: p.grad for name, p in chain.named_parameters()}

    assert_same(*both_modes(chain, step))


def test_lazy_modules_are_refused_until_they_have_seen_an_input(device):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(nn.LazyLinear(4))).to(device)
    x = torch.randn(6, 8, device=device)
    with pytest.raises(RuntimeError, match=r"LazyLinear has lazy parameters.*no_grad"):
        chain(x)
    with torch.no_grad():
        chain(x)
    chain(x).sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())


def test_floating_point_operations_can_be_counted(device):
    chain = chain_of(linear, device=device)
    x = torch.randn(6, 8, dtype=torch.float64, device=device, requires_grad=True)
    counts = []
    for reversing in (True, False):
        with FlopCounterMode(display=False) as counter:
            revcore.set_reversing(chain, reversing)(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] / counts[1] == pytest.approx(4 / 3)


class Query(nn.Module):
    """Calls a module with a leaf, as one with a learned query does."""

    def __init__(self):
        super().__init__()
        self.query, self.linear = nn.Parameter(torch.randn(4, 4)), linear()

    def forward(self, x, c):
        return x.tanh() * self.linear(self.query) * self.linear(c)


def test_floating_point_operations_of_leaves_can_be_counted(device):
    blocks = [revcore.ReversibleBlock(Query()) for _ in range(2)]
    chain = revcore.ReversibleSequential(*blocks).to(device)
    x, c = torch.randn(4, 8, device=device), torch.randn(4, 4, device=device, requires_grad=True)
    counts, found = [], []
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing).zero_grad()
        c.grad = None
        with FlopCounterMode(display=False) as counter:
            chain(x, c=c).square().sum().backward()
        found.append([c.grad, *(p.grad.clone() for p in chain.parameters())])
        counts.append(counter.get_total_flops())
    torch.testing.assert_close(*found)
    assert counts[0] / counts[1] == pytest.approx(4 / 3)


class Auxiliary(nn.Linear):
    """Leaves a result where the caller finds it, as routers leave the loss that balances them."""

    def forward(self, x):
        y = super().forward(x)
        self.balance = y.square().mean()
        return y


def test_a_result_that_a_branch_leaves_in_an_attribute_is_named(device):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Auxiliary(4, 4))).to(device)
    x = torch.randn(6, 8, device=device)
    with pytest.warns(UserWarning, match="Auxiliary leaves a result in its attribute 'balance'"):
        chain(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        revcore.set_reversing(chain, False)(x).sum().backward()
        branches = [nn.utils.spectral_norm(nn.Linear(4, 4)) for _ in range(2)]
        block = revcore.ReversibleBlock(*branches).to(device)
        block(x).sum().backward()  # its weight is such an attribute, of its own parameter


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_traced_branches(device):
    example = torch.randn(6, 4, dtype=torch.float64, device=device)
    branches = [torch.jit.trace(linear().to(example), example) for _ in range(2)]
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(*branches))

    def step(chain):
        chain.zero_grad()
        loss_of(chain(torch.cat((example, example), 1))).backward()
        return {name: p.grad.clone() for name, p in chain.named_parameters()}

    assert_same(*both_modes(chain, step))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_frozen_script_modules_in_branches():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()
            # Its weights become constants.
            frozen = torch.jit.script(nn.Sequential(linear()).double().eval())
            self.frozen = torch.jit.freeze(frozen)

        def forward(self, x):
            return self.linear(x) + self.frozen(x)

    block = revcore.ReversibleBlock(Features(), Features()).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    ours, plain = both_modes(block, lambda net: gradients(net, net, x))
    assert_same(ours, plain)


class Contractive(nn.Linear):
    """Divides by the norm of its Jacobian, which it takes in forward mode."""

    def forward(self, x):
        function, at = super().forward, x.detach().mean(0)
        jacobian = torch.autograd.functional.jacobian(
            lambda v: function(v).tanh(), at, vectorize=True, strategy="forward-mode"
        )
        return function(x).tanh() / (1 + jacobian.norm())


@pytest.mark.parametrize("recomputes", [False, True])
def test_derivatives_in_forward_mode_inside_of_a_branch(recomputes, device):
    if recomputes:
        module = Contractive(4, 4).double().to(device)
        x = torch.randn(3, 4, dtype=torch.float64, device=device)
        ours = gradients(lambda x: revcore.recompute(module, x), module, x)
        assert_same(ours, gradients(module, module, x))
        return
    chain = chain_of(lambda: Contractive(4, 4), device=device)
    x = torch.randn(3, 8, dtype=torch.float64, device=device)
    assert_same(*both_modes(chain, lambda net: gradients(net, net, x)))
