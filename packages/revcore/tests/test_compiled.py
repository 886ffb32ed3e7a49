"""The whole chain under torch.compile(fullgraph=True): right, in constant memory, or refused."""

import copy

import pytest
import torch
from cases import SCHEMES, Mixing, assert_same, gradients, make_case, traceable
from torch import nn

import revcore

pytestmark = traceable

# What is asked is whether a chain can be traced and differentiated, not what code is made of it.
BACKEND = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def compiled(module, *, fullgraph=True):
    return torch.compile(module, backend=BACKEND, fullgraph=fullgraph)


def assert_as_plain(case, x=None, tolerance=1e-9):
    twin = case.twin()
    x = case.x if x is None else x
    ours = gradients(compiled(case.chain), case.chain, x)
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, x), tolerance)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        *((scheme, "conv2d") for scheme in SCHEMES if scheme != "fixed-point"),
        *(("additive", kind) for kind in ("mlp", "conv1d", "transformer")),
    ],
)
def test_gradients_are_those_of_plain_autograd(scheme, kind, device):
    assert_as_plain(make_case(scheme, kind, device=device))


def test_evaluation_mode_and_kept_inputs(device):
    case = make_case("affine-exp", "conv2d", device=device)
    case.chain.eval()
    case.chain[1].keep_input = True
    assert_as_plain(case)


@pytest.mark.parametrize("frozen", ["0.coupling.f", "0", "2"])
def test_frozen_parts(frozen):
    case = make_case("additive", "mlp")
    case.chain.get_submodule(frozen).requires_grad_(False)
    assert_as_plain(case)


def test_parametrized_branches():
    case = make_case("additive", "mlp")
    for block in case.chain:
        nn.utils.parametrizations.weight_norm(block.coupling.f[0])
    assert_as_plain(case)


def under_autocast(function):
    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(x).float()

    return run


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scheme", [revcore.AdditiveCoupling, Mixing])
def test_autocast(scheme, inside):
    branches = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6))
    chain = revcore.ReversibleSequential(*map(scheme, branches, branches))
    twin, x = revcore.set_reversing(copy.deepcopy(chain), False), torch.randn(6, 8)
    run = compiled(under_autocast(chain)) if inside else under_autocast(compiled(chain))
    ours = gradients(run, chain, x)
    stored = gradients(under_autocast(twin), twin, x)
    for name, expected in stored.items():
        assert (ours[name] - expected).norm() <= 0.02 * expected.norm(), name


class Scaled(nn.Linear):
    def forward(self, x, scale, times=1):
        return torch.tanh(super().forward(x)) * scale * times


def test_arguments_get_their_gradients():
    chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(Scaled(4, 4)) for _ in range(3)))
    results = []
    for run in (compiled(chain), revcore.set_reversing(copy.deepcopy(chain), False)):
        torch.manual_seed(0)
        x = torch.randn(3, 8, requires_grad=True)
        scale = torch.rand(4, requires_grad=True)
        run(x, scale=scale, times=2).sin().sum().backward()
        results.append({"x": x.grad, "scale": scale.grad})
    assert_same(*results, tolerance=1e-5)


def test_inverse_and_invertible_modules():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x):
            return x * self.factor

        def inverse(self, y):
            return y / self.factor

    blocks = [revcore.ReversibleBlock(nn.Linear(4, 4)), revcore.ReversibleBlock(nn.Linear(4, 4))]
    chain = revcore.ReversibleSequential(blocks[0], Double(), blocks[1]).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    assert_same(gradients(compiled(chain), chain, x), gradients(twin, twin, x))
    assert_same(gradients(compiled(chain.inverse), chain, x), gradients(twin.inverse, twin, x))


def kept_bytes(depth):
    torch.compiler.reset()
    branches = [
        nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        for _ in range(2 * depth)
    ]
    chain = revcore.ReversibleSequential(
        *(revcore.ReversibleBlock(*branches[2 * i : 2 * i + 2]) for i in range(depth))
    )
    batch = 1000
    y = compiled(chain)(torch.randn(batch, 16, requires_grad=True))
    return sum(t.nbytes for t in y.grad_fn.saved_tensors if t.dim() and len(t) == batch)


def test_what_is_kept_does_not_grow_with_depth():
    shallow, deep = kept_bytes(2), kept_bytes(6)
    assert 0 < deep <= shallow


def drops():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))


class DropsByFunction(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Unknown(nn.Module):
    """Of a class of which revcore does not know that it draws nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).tanh()


def test_batches_of_several_sizes():
    torch.compiler.reset()
    couplings = [revcore.AdditiveCoupling(Unknown(), Unknown()) for _ in range(2)]
    chain = revcore.ReversibleSequential(*couplings, split_dim=-1)
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    for batch in (5, 7, 9):
        x = torch.randn(batch, 8, requires_grad=True)
        (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(chain(x).square().sum(), x)
        torch.testing.assert_close(ours, theirs)


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


class Flip(nn.Module):
    coupling = "none"  # an attribute of this name need not be a coupling

    def forward(self, x):
        return x.flip(1)

    inverse = forward


def test_any_module_with_an_inverse(device):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(4, 4)), Flip())
    chain.to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(6, 8, device=device)
    assert_same(gradients(compiled(chain), chain, x), gradients(twin, twin, x), 1e-5)


@pytest.mark.parametrize("hooked", ["1", "1.coupling"])
def test_a_hook_on_a_block_is_refused(hooked):
    case = make_case("additive", "mlp")
    case.chain.get_submodule(hooked).register_forward_hook(lambda *_: None)
    with pytest.raises(Exception, match="has a forward hook"):
        compiled(case.chain)(case.x.clone().requires_grad_())
