"""`check_invertible` finds what is wrong, names the first bad block, and leaves no trace."""

import math
import random
from functools import partial

import pytest
import torch
from cases import KINDS, SCHEMES, make_case
from torch import nn

import revcore
from revcore import ReversibleBlock, ReversibleSequential, check_invertible


def linear(gain=1.0):
    layer = nn.Linear(4, 4)
    nn.init.orthogonal_(layer.weight, gain)
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_good_chains_pass(scheme, kind):
    case = make_case(scheme, kind)
    report = check_invertible(case.chain, case.x)
    assert report
    assert report.first_bad is None
    assert [block.name for block in report.blocks] == ["0", "1", "2", "ReversibleSequential"]
    assert all(0 <= block.inverse_error < 1e-8 for block in report.blocks)
    assert all(0 <= block.gradient_error < 1e-8 for block in report.blocks)
    assert str(report).endswith("nothing is wrong")


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("make", [ReversibleBlock, revcore.AdditiveCoupling])
def test_blocks_and_couplings_alone(make, streams):
    block = make(linear(), linear())
    x = torch.randn(3, 8).chunk(streams, 1)
    assert [row.kind for row in check_invertible(block, *x).blocks] == [make.__name__]


class Net(nn.Module):
    """A net that is not invertible, around two chains."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.first = ReversibleSequential(ReversibleBlock(nn.BatchNorm1d(4)))
        self.second = ReversibleSequential(
            ReversibleBlock(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))),
            ReversibleBlock(linear()),
        )

    def forward(self, x, scale=1.0):
        return self.second(self.first(self.stem(x) * scale).relu_()).sum()


def test_every_chain_in_a_net():
    report = check_invertible(Net(), torch.randn(5, 3), scale=torch.tensor(2.0))
    assert report
    names = [block.name for block in report.blocks]
    assert names == ["first.0", "first", "second.0", "second.1", "second"]


def test_it_leaves_no_trace():
    net = Net()
    net.second.eval()
    net.first.reversing = False
    net(torch.randn(5, 3)).backward()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    versions = [buffer._version for buffer in net.buffers()]
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    flags = [(part.training, getattr(part, "reversing", None)) for part in net.modules()]
    draws = torch.get_rng_state()
    x = torch.randn(5, 3)
    kept, draws = x.clone(), torch.get_rng_state()
    assert check_invertible(net, x)
    assert torch.equal(draws, torch.get_rng_state())
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert versions == [buffer._version for buffer in net.buffers()]
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert flags == [(part.training, getattr(part, "reversing", None)) for part in net.modules()]
    assert not any(part._forward_hooks for part in net.modules())


class Third(nn.Module):
    """Its inverse is wrong."""

    def forward(self, x):
        return 2 * x

    def inverse(self, y):
        return y / 3


def test_a_wrong_inverse():
    assert (
        "inverse does not undo forward"
        in check_invertible(Third(), torch.randn(3)).first_bad.problem
    )
    chain = ReversibleSequential(ReversibleBlock(linear()), Third(), ReversibleBlock(linear()))
    report = check_invertible(chain, torch.randn(3, 8))
    assert not report
    assert report.first_bad.name == "1"
    assert report.first_bad.inverse_error == pytest.approx(1 / 3, rel=1e-3)
    assert [bool(block.problem) for block in report.blocks] == [False, True, False, True]
    assert "first bad block: 1: inverse does not undo forward" in repr(report)


def test_a_tolerance_of_nothing():
    chain = ReversibleSequential(ReversibleBlock(linear()), ReversibleBlock(linear()))
    report = check_invertible(chain, torch.randn(30, 8), tolerance=0.0)
    assert not report
    assert report.blocks[-1].tolerance == 0


def test_an_inverse_that_raises():
    class Missing(nn.Module):
        def forward(self, x):
            return x + 1

        def inverse(self, y):
            raise NotImplementedError("later")

    report = check_invertible(Missing(), torch.randn(3))
    assert report.first_bad.problem == "NotImplementedError: later"


def test_an_inverse_of_another_shape():
    class Longer(Third):
        def inverse(self, y):
            return torch.cat((y, y)) / 2

    assert not check_invertible(Longer(), torch.randn(3))


class Noise(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = linear(), draw

    def forward(self, x):
        return self.linear(x) * self.draw()


@pytest.mark.parametrize("case", ["python", "generator"])
def test_a_branch_that_cannot_be_repeated(case):
    generator = torch.Generator().manual_seed(0)
    draw = random.random if case == "python" else lambda: torch.rand((), generator=generator)
    chain = ReversibleSequential(ReversibleBlock(linear()), ReversibleBlock(Noise(draw)))
    report = check_invertible(chain, torch.randn(3, 8))
    assert report.first_bad.name == "1"
    assert "not deterministic" in report.first_bad.problem


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.5), nn.utils.parametrizations.spectral_norm(linear())]
)
def test_what_is_replayed_is_fine(module):
    chain = ReversibleSequential(ReversibleBlock(nn.Sequential(linear(), module)))
    assert check_invertible(chain, torch.randn(3, 8))


class Noisy(nn.Module):
    """Draws in evaluation, too."""

    def forward(self, x):
        return nn.functional.dropout(x.tanh(), 0.2, training=True)


def test_what_draws_in_evaluation_is_judged_by_its_gradients():
    report = check_invertible(ReversibleSequential(ReversibleBlock(Noisy())), torch.randn(3, 8))
    assert report
    assert all(math.isnan(block.inverse_error) for block in report.blocks)
    assert all(block.gradient_error < 1e-5 for block in report.blocks)


def drifting():
    torch.manual_seed(0)
    return ReversibleSequential(*(ReversibleBlock(linear(1.5)) for _ in range(12)))


def test_drift_is_laid_to_the_chain():
    chain, x = drifting(), torch.randn(3, 8)
    report = check_invertible(chain, x)
    assert report.first_bad.kind == "ReversibleSequential"
    assert "add up" in report.first_bad.problem
    assert all(block.inverse_error < 1e-5 for block in report.blocks[:-1])
    assert check_invertible(chain, x, tolerance=1e9)
    assert check_invertible(chain.double(), x.double(), tolerance=1e-3)


def test_anchors_mend_it():
    chain = drifting()
    for block in list(chain)[::2]:
        block.keep_input = True
    assert check_invertible(chain, torch.randn(3, 8))


def test_wrong_gradients():
    class Detached(revcore.AdditiveCoupling):
        def combine_vjp(self, a, t, grad):
            return grad, 2 * grad

    report = check_invertible(Detached(linear(), linear()), torch.randn(3, 8))
    assert "gradients are not those of stored activations" in report.first_bad.problem


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, other=None):
        return x if other is None else x + self.f(other)

    inverse = forward


@pytest.mark.parametrize("x", [(torch.zeros(2, 4), None), (torch.zeros(2, 4).long(),)])
def test_what_is_called_with_others_than_streams(x):
    report = revcore.check_invertible(Embedding(), *x)
    assert not report
    assert "cannot be checked: called with torch." in report.blocks[0].problem


def test_an_input_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = revcore.ReversibleBlock(nn.Linear(4, 4))

        def forward(self, *, x):
            return self.block(x)

    assert revcore.check_invertible(Net(), x=torch.randn(2, 8))


def test_nothing_to_check():
    with pytest.raises(ValueError, match="Linear called nothing that has a method inverse"):
        check_invertible(nn.Linear(2, 2), torch.randn(3, 2))


def test_repr_of_a_chain_says_what_it_stores():
    chain = ReversibleSequential(*(ReversibleBlock(linear(), keep_input=i == 1) for i in range(3)))
    assert "reversing=True, blocks=3, stores='output and 1 kept inputs'" in repr(chain)
    assert "stores='all activations'" in repr(revcore.set_reversing(chain, False))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_module_that_holds_a_result_of_autograd():
    """As those of the older weight_norm do, which `copy.deepcopy` alone refuses."""
    chain = ReversibleSequential(ReversibleBlock(*(nn.utils.weight_norm(linear()) for _ in "fg")))
    before = chain[0].coupling.f.weight
    assert check_invertible(chain, torch.randn(3, 8))
    assert chain[0].coupling.f.weight is before


def test_an_example_that_is_not_a_number_is_not_well():
    block = revcore.ReversibleBlock(nn.Linear(4, 4))
    assert not revcore.check_invertible(block, torch.full((2, 8), torch.nan))


def test_any_error_of_an_inverse_is_reported():
    class Wrong(nn.Module):
        def forward(self, x):
            return 2 * x

        def inverse(self, y):
            return {}["nothing"] * y

    report = revcore.check_invertible(Wrong(), torch.ones(2, 8))
    assert "KeyError" in report.first_bad.problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fixed_point_chain_is_compared_with_what_it_rounds_to(dtype):
    coupling = partial(revcore.FixedPointCoupling, fraction_bits=8)
    chain = ReversibleSequential(*(ReversibleBlock(linear(), coupling=coupling) for _ in range(2)))
    report = check_invertible(chain.to(dtype), torch.randn(3, 8, dtype=dtype))
    assert report
    assert {block.inverse_error for block in report.blocks} == {0.0}
