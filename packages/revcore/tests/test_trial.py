"""What is found out before a chain is compiled, by running copies of its branches."""

import copy

import pytest
import torch
from cases import assert_same, compiled, gradients, traceable
from torch import nn

import revcore

pytestmark = [traceable, pytest.mark.usefixtures("fresh_compiler")]


def inner_chain():
    return revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(2, 2)))


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


class Uncounted(nn.Module):
    """Changes a buffer in a way that torch does not count, or not on tensors without data."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        h = self.linear(x)
        if self.how == "data":
            self.mean.data.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        elif self.how == "foreach":
            torch._foreach_mul_([self.mean], 0.9)
        else:
            h = nn.functional.batch_norm(h, self.mean, self.var, training=True)
        return (h * (1 + self.mean.clone())).tanh()


class ReadsStatistics(nn.Module):
    def __init__(self, how="product"):
        super().__init__()
        self.norm, self.linear, self.how = nn.BatchNorm1d(4), nn.Linear(4, 4), how

    def forward(self, x):
        h, norm = self.linear(self.norm(x)) * 1, self.norm
        if self.how == "product":
            h = h * (1 + norm.running_mean)
        elif self.how == "in place":
            h += norm.running_mean
        else:
            mean, var = norm.running_mean, norm.running_var
            h = nn.functional.batch_norm(h, None, None, weight=var, bias=mean, training=True)
        return h.tanh()


class Average(nn.Module):
    """Changes a tensor that is no buffer, and what another module has that it holds unseen."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.hidden = nn.Linear(4, 4), []
        if how == "hidden":
            self.hidden.append(nn.BatchNorm1d(4, affine=False).double())
        self.mean = torch.ones(4, dtype=torch.float64) if how == "attribute" else None

    def forward(self, x):
        h = self.linear(x)
        for norm in self.hidden:
            h = norm(h)
        if self.mean is not None:
            self.mean.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        return h


@torch.library.custom_op("revcore_tests::mask", mutates_args=())
def mask(x: torch.Tensor) -> torch.Tensor:
    return (torch.rand_like(x) > 0.5).to(x.dtype)


mask.register_fake(torch.empty_like)


class DropsUnseen(nn.Linear):
    """Draws random numbers where no mode of torch sees it."""

    def forward(self, x):
        return super().forward(x) * mask(x.detach())


class Remembers(nn.Linear):
    """Decides by what rounding turns over."""

    def forward(self, x):
        (mask,) = revcore.remember(lambda: ((x * 1e15).sin() > 0,))
        return super().forward(x) * mask


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
        (Deciding, "looks at its data"),
        (lambda: Uncounted("data"), "changes its buffer 'mean'"),
        (lambda: Uncounted("foreach"), "changes its buffer 'mean'"),
        (lambda: Uncounted("batch_norm"), "changes its buffer 'mean'"),
        (ReadsStatistics, "reads statistics that a batch norm changes"),
        (lambda: ReadsStatistics("in place"), "reads statistics that a batch norm changes"),
        (lambda: ReadsStatistics("weight"), "reads statistics that a batch norm changes"),
        (lambda: Average("attribute"), "changes an attribute"),
        (lambda: Average("hidden"), "changes its buffer"),
        (lambda: DropsUnseen(4, 4), "random numbers in a branch"),
        (lambda: Remembers(4, 4), "calls revcore.remember"),
        (inner_chain, "a chain inside of a branch"),
    ],
    ids=[
        *("in place", "rebound", "spectral norm", "data", ".data", "foreach", "F.batch_norm"),
        *("statistics", "in place", "as a weight", "attribute", "hidden", "custom operation"),
        *("remember", "chain"),
    ],
)
def test_what_is_refused_is_left_to_the_eager_engine(branch, message):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).double()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(Exception, match=message):
        compiled(chain)(x.clone().requires_grad_())
    torch.compiler.reset()
    torch.manual_seed(3)
    ours = gradients(compiled(chain, fullgraph=False), chain, x)
    torch.manual_seed(3)
    assert_same(ours, gradients(twin, twin, x))
    assert_same(chain.state_dict(), twin.state_dict())
    if isinstance(chain[0].coupling.f, Average):
        one, two = (net[0].coupling.f for net in (chain, twin))
        for norm, other in zip(one.hidden, two.hidden, strict=True):
            assert_same(norm.state_dict(), other.state_dict())
        assert one.mean is None or torch.equal(one.mean, two.mean)


TABLES = {}


def table(size):
    if size not in TABLES:
        TABLES[size] = torch.arange(size).sin()[:, None]
    return TABLES[size]


def test_a_table_that_a_branch_caches():
    """What is tried out while it is traced must leave nothing but true tensors behind."""

    class Tabled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * table(len(x))

    TABLES.clear()
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Tabled(4, 4))).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    ours = gradients(compiled(chain), chain, x)
    assert type(TABLES[5]) is torch.Tensor
    assert_same(ours, gradients(revcore.set_reversing(chain, False), chain, x))


class Estimated(nn.Module):
    """Has a log-determinant that it estimates by chance."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8, 8))

    def forward(self, x):
        return x + x @ self.weight

    def inverse(self, y):
        return torch.linalg.solve((torch.eye(8).to(y) + self.weight).T, y.T).T

    def log_det(self, x):
        v = torch.randn_like(x)
        return (v @ self.weight * v).sum(1)


def test_a_log_determinant_that_draws_random_numbers():
    chain = revcore.ReversibleSequential(Estimated(), log_det=True).double()
    with pytest.raises(Exception, match="random numbers in a branch cannot be repeated"):
        compiled(chain)(torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


class Elsewhere(nn.Linear):
    """Has a buffer that another branch changes."""

    def __init__(self, buffer):
        super().__init__(4, 4)
        self.register_buffer("mean", buffer)

    def forward(self, x):
        return super().forward(x) * (1 + self.mean)


def test_statistics_of_another_branch():
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    block = revcore.ReversibleBlock(norm, Elsewhere(norm[0].running_mean).double())
    chain = revcore.ReversibleSequential(block)
    assert block.coupling.g.mean is norm[0].running_mean
    with pytest.raises(Exception, match="reads statistics that a batch norm changes"):
        compiled(chain)(torch.randn(3, 8, dtype=torch.float64, requires_grad=True))
