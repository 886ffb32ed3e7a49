"""What a compiled chain refuses, or leaves to the eager engine where graph breaks are allowed."""

import copy

import pytest
import torch
from cases import assert_same, compiled, gradients, make_case, traceable
from torch import nn

import revcore

pytestmark = [traceable, pytest.mark.usefixtures("fresh_compiler")]


def drops():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))


def inner_chain():
    return revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(2, 2)))


class DropsByFunction(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("branch", [drops, lambda: DropsByFunction(4, 4)])
def test_random_numbers_are_refused_or_left_to_the_eager_engine(branch):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).double()
    state = copy.deepcopy(chain.state_dict())
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(Exception, match="random numbers in a branch cannot be repeated"):
        compiled(chain)(x.clone().requires_grad_())
    torch.compiler.reset()
    torch.manual_seed(3)
    ours = gradients(compiled(chain, fullgraph=False), chain, x)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    torch.manual_seed(3)
    assert_same(ours, gradients(twin, twin, x))
    assert_same(chain.state_dict(), state)
    torch.compiler.reset()
    assert compiled(chain.eval())(x.requires_grad_()).shape == x.shape


def test_fixed_point_is_refused_and_its_branches_can_be_compiled():
    case = make_case("fixed-point", "mlp")
    with pytest.raises(Exception, match="fixed-point chain cannot be compiled as a whole"):
        compiled(case.chain)(case.x.clone().requires_grad_())


@pytest.mark.parametrize("hooked", ["1", "1.coupling"])
def test_a_hook_on_a_block_is_refused(hooked):
    case = make_case("additive", "mlp")
    block = case.chain.get_submodule(hooked)
    for register in (block.register_forward_hook, block.register_full_backward_hook):
        hook = register(lambda *_: None)
        with pytest.raises(Exception, match="has a hook, or a forward or inverse of its own"):
            compiled(case.chain)(case.x.clone().requires_grad_())
        hook.remove()
        torch.compiler.reset()
    compiled(case.chain)(case.x.clone().requires_grad_())


class Averaging(nn.Module):
    """Changes a buffer that it reads."""

    def __init__(self, *, in_place):
        super().__init__()
        self.linear, self.in_place = nn.Linear(4, 4), in_place
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        if self.in_place:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.abs().mean(0))
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().abs().mean(0)
        return self.linear(x) / self.mean


class Deciding(nn.Module):
    """Looks at its data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * float(x.detach().sum().item() > 0)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (lambda: Averaging(in_place=True), "changes its buffer 'mean'"),
        (lambda: Averaging(in_place=False), "changes its buffer 'mean'"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "changes its buffer"),
        (Deciding, "cannot be run without data"),
        (inner_chain, "a chain inside of a branch"),
    ],
    ids=["in place", "rebound", "spectral norm", "data", "chain"],
)
def test_what_is_refused_is_left_to_the_eager_engine(branch, message):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).double()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(Exception, match=message):
        compiled(chain)(x.clone().requires_grad_())
    torch.compiler.reset()
    ours = gradients(compiled(chain, fullgraph=False), chain, x)
    assert_same(ours, gradients(twin, twin, x))
    assert_same(chain.state_dict(), twin.state_dict())


def test_tensors_inside_of_arguments_are_refused():
    class Conditioned(nn.Linear):
        def forward(self, x, condition):
            return super().forward(x) * condition[0]

    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Conditioned(4, 4)))
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(Exception, match="none inside of lists"):
        compiled(chain)(x, condition=[torch.ones(4)])


class OwnForward(revcore.AdditiveCoupling):
    def forward(self, *x, **kwargs):
        return super().forward(*x, **kwargs)


class OwnBlock(revcore.ReversibleBlock):
    def forward(self, *x, **kwargs):
        return super().forward(*x, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: revcore.ReversibleBlock(nn.Linear(4, 4), coupling=OwnForward),
        lambda: revcore.ReversibleSequential(OwnBlock(nn.Linear(4, 4))),
    ],
    ids=["of a coupling", "of a block"],
)
def test_a_forward_of_its_own_is_refused(make):
    with pytest.raises(Exception, match="has a hook, or a forward or inverse of its own"):
        compiled(make())(torch.randn(3, 8, requires_grad=True))


class Attributes(nn.Linear):
    """Changes an attribute, and keeps a result in another."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        y = super().forward(x) * self.calls
        self.last = y.detach()
        return y


class Checkpointed(nn.Linear):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Hooked(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_full_backward_hook(lambda *_: None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("branch", [Attributes, Checkpointed, Hooked])
def test_what_cannot_be_compiled_is_left_to_the_eager_engine(branch, device):
    torch.manual_seed(0)
    blocks = (revcore.ReversibleBlock(branch(4, 4), branch(4, 4)) for _ in range(2))
    chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    compiled = torch.compile(chain, backend="aot_eager")
    for _ in range(2):
        found = []
        for net, parameters in ((compiled, chain.parameters()), (twin, twin.parameters())):
            found.append(list(torch.autograd.grad(net(x).square().sum(), list(parameters))))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    copy.deepcopy(chain)
    if branch is Attributes:
        counts = [block.coupling.f.calls for block in (*chain, *twin)]
        assert counts == [2] * 4


def test_a_tensor_that_an_adapter_finds_elsewhere_compiled(device):
    torch.manual_seed(0)
    alpha = torch.ones((), device=device, requires_grad=True)

    def adapter(t):
        return (alpha * t).exp(), t

    coupling = revcore.AffineCoupling(nn.Linear(4, 4), nn.Linear(4, 4), adapter=adapter)
    chain = revcore.ReversibleSequential(coupling).to(device)
    with pytest.raises(Exception, match=r"uses a tensor of shape|Observed exception"):
        torch.compile(chain, backend="aot_eager")(torch.randn(5, 8, device=device)).sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_backward_pass_that_is_compiled(device):
    """The eager engine under compiled autograd, which traces what nodes do in Python."""
    from torch._dynamo import compiled_autograd  # noqa: PLC0415 - takes seconds

    case = make_case("additive", "conv2d", device=device)
    plain = gradients(case.plain, case.chain, case.x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        ours = gradients(case.chain, case.chain, case.x)
    assert_same(
        {name: value for name, value in ours.items() if not name.startswith("buffer")},
        {name: value for name, value in plain.items() if not name.startswith("buffer")},
    )
