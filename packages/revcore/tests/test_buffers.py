"""Buffers of branches, and tensors in attributes: what runs change, and what they leave alone."""

import copy
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_stored, chain_of_branches, step_of
from torch import nn

import revcore
from revcore.buffers import copy_all


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(6, 8, dtype=torch.float64, device=device)


class Counting(nn.Module):
    """Reads a buffer that it counts up, in a way that may not be counted itself."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how
        if how == "none":
            self.register_buffer("n", None)
        elif how != "new":
            dtype = {"complex": torch.complex64, "integer": torch.int64}.get(how)
            self.register_buffer("n", torch.ones(1, dtype=dtype))

    def forward(self, x):
        n = self._buffers.get("n")
        if n is None:
            self.register_buffer("n", torch.full((1,), 2.0, device=x.device))
        elif self.how == "rebound":
            self.n = n + 1
        else:
            n.data += 1
        return self.linear(x) * abs(self.n)


@pytest.mark.parametrize("how", ["float", "integer", "complex", "rebound", "none", "new"])
def test_buffers(how, x):
    assert_as_stored(lambda: chain_of_branches(Counting(how)), x)


class Offset(nn.Module):
    """Has a buffer that takes a gradient, which a buffer should not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x):
        return self.linear(x) + self.offset


def test_a_buffer_that_takes_a_gradient(x):
    chain = chain_of_branches(Offset()).double().to(x.device)
    step_of(chain, x)
    chain[0].coupling.f.offset = torch.ones(4, dtype=x.dtype, device=x.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        step_of(chain, x)


class Leaving(Offset):
    """Leaves a loss in a buffer."""

    def forward(self, x):
        self.offset = self.linear(x).square().sum()
        return super().forward(x)


def test_a_loss_that_is_left_in_a_buffer_is_named(x):
    with pytest.warns(UserWarning, match="leaves a result in its attribute 'offset'"):
        step_of(chain_of_branches(Leaving()).double().to(x.device), x)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(33, 33))
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("places", torch.arange(256).view(2, 128))
        self.register_buffer("none", torch.zeros(0, 3))

    def forward(self, x):
        return self.linear(x) * self.mask[0, 0]


def test_copies_of_large_buffers_are_dropped_if_nothing_has_changed(device):
    def kept(depth):
        chain = chain_of_branches(Masked(), depth).to(device)
        y = torch.zeros(2, 8, device=device, requires_grad=True)
        with revcore.track_memory() as memory:
            y = chain(y)
        return memory.live_bytes

    small = torch.tensor(1.0).nbytes + torch.arange(256).nbytes
    assert kept(8) - kept(2) == 12 * small


class Odd(nn.Module):
    """Has buffers that not every operation takes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("wide", torch.ones(1).expand(2))
        self.register_buffer("column", torch.ones(3, 3)[:, 0])
        self.register_buffer("conjugate", torch.ones(2, dtype=torch.complex64).conj())
        self.register_buffer("negative", torch.ones(2, dtype=torch.complex64).conj().imag)
        self.register_buffer("packed", torch.zeros(512).to(torch.float8_e4m3fn))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer(
            "quantized", torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)
        )

    def forward(self, x):
        return self.linear(x)


@pytest.mark.filterwarnings("ignore")
def test_buffers_of_other_kinds(device):
    chain = chain_of_branches(Odd())
    for block in chain:
        block.coupling.f.linear.to(device)
        block.coupling.g.linear.to(device)
    assert step_of(chain, torch.ones(2, 8, device=device))[1].isfinite().all()


class Uncounted(nn.Module):
    """Changes a buffer uncounted in training, which it reads in evaluation."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.data = 0.5 * self.mean + x.detach().mean(0)
            self.mean.data.add_(0.1)
        return (self.linear(x) - self.mean).tanh()


def test_a_call_in_training_before_the_backward_pass_of_one_in_evaluation(x):
    def take(net, x):
        net.zero_grad()
        y = net.eval()(x)
        net.train()(x)
        y.square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert_as_stored(lambda: chain_of_branches(Uncounted()), x, take)


def test_a_branch_that_another_makes_a_buffer_for(x):
    def make():
        branch = Counting("new")
        return revcore.ReversibleSequential(revcore.ReversibleBlock(branch, branch))

    assert_as_stored(make, x)


class Table(nn.Module):
    """Changes a large buffer if it is told to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(2**18))

    def forward(self, x, *, change):
        if change:
            self.table += 1
        return self.linear(x) * self.table[0]


@pytest.mark.parametrize("changes", [(True, True), (False, False), (False, True)])
def test_large_buffers(changes, x):
    chain = chain_of_branches(Table(), 1).double().to(x.device)
    chain[0].coupling.f.register_buffer("other", torch.ones(2**18, device=x.device))
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for number, change in enumerate(changes):
        y = chain(x.requires_grad_(), change=change)
        if number and change and not changes[0]:
            # It was taken for a constant after the first call.
            with pytest.raises(RuntimeError, match="'table' of Table was changed in place"):
                y.sum().backward()
            continue
        ours = torch.autograd.grad(y.sum(), list(chain.parameters()))
        stored = torch.autograd.grad(twin(x, change=change).sum(), list(twin.parameters()))
        torch.testing.assert_close(ours, stored)


class Halving(nn.Module):
    """Changes a buffer of any size uncounted, as F.batch_norm does."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(size))

    def forward(self, x):
        y = self.linear(x) * self.mean[0]
        self.mean.data.mul_(0.5)
        return y


@pytest.mark.parametrize("size", [4, 2**17])
def test_buffers_that_change_uncounted(size, x):
    assert_as_stored(lambda: chain_of_branches(Halving(size)), x, steps=3)


class Remembering(nn.Module):
    """Holds the last keys in a plain attribute, which it changes uncounted."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.keys = torch.ones(size, 4, dtype=torch.float64)

    def forward(self, x):
        y = self.linear(x)
        keys = torch.cat((self.keys[len(x) :], y.detach()))
        attended = (y * self.keys.mean(0)).tanh()
        self.keys.data.copy_(keys)
        return attended


@pytest.mark.parametrize("size", [10, 2**14])
def test_attributes_that_change_uncounted(size, x):
    def take(net, x):
        keys = [net[0].coupling.f.keys.clone(), net[1].coupling.g.keys.clone()]
        return [*step_of(net, x), *keys]

    if x.device.type == "cpu":  # an attribute stays where it is
        assert_as_stored(lambda: chain_of_branches(Remembering(size)), x, take, steps=3)


class Unfrozen(nn.Module):
    """Begins to change its statistics, uncounted, in the second step."""

    def __init__(self):
        super().__init__()
        self.linear, self.steps = nn.Linear(4, 700), 0
        self.register_buffer("mean", torch.zeros(700))
        self.register_buffer("var", torch.ones(700))

    def forward(self, x):
        self.steps += 1
        momentum = 0.1 if self.steps > 1 else 0.0
        y = F.batch_norm(self.linear(x), self.mean, self.var, training=True, momentum=momentum)
        return y[:, :4]


def test_statistics_that_are_frozen_for_a_while(x):
    assert_as_stored(lambda: chain_of_branches(Unfrozen()), x, steps=3)


class Wide(nn.Module):
    """Has a batch norm with large buffers, and is no module of torch's own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16384)

    def forward(self, x):
        return self.norm(x.repeat(1, 4096))[:, :4]


def test_statistics_that_another_call_changes_after_one_in_evaluation(x):
    net = chain_of_branches(Wide()).to(x)
    # Plain autograd does not see that they were changed.
    twin = revcore.set_reversing(copy.deepcopy(net).eval(), False)
    for _ in range(2):
        net.eval()
        twin.load_state_dict(net.state_dict())
        right = step_of(twin, x)
        net.zero_grad()
        y = net(x.requires_grad_())
        net.train()
        with torch.no_grad():
            net(x)
        found = torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
        torch.testing.assert_close([y, *found], right)


class Graph(nn.Module):
    """Has a sparse buffer, as nets of graphs do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("adjacency", torch.eye(6).roll(1, 0).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, self.linear(x))


def test_sparse_buffers(x):
    def take(net, x):
        found = step_of(net, x)
        for module in net.modules():
            module._buffers.clear()
        return found

    chain = assert_as_stored(lambda: chain_of_branches(Graph()), x, take, steps=1)
    assert len(list(chain.buffers())) == 0


class Neighbours(nn.Module):
    """Has a large constant in a plain attribute, dense or sparse."""

    def __init__(self, layout):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        table = torch.eye(256)
        self.table = table if layout == "dense" else getattr(table, f"to_sparse_{layout}")()

    def forward(self, x):
        return self.linear(x) * (self.table @ torch.ones(256, 1)).sum() / 256


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
def test_large_constants_are_not_copied_in_each_call(layout, monkeypatch):
    # torch cannot copy all layouts, so there is no deep copy.
    chain = revcore.ReversibleBlock(Neighbours(layout), Neighbours(layout))
    counts = deque()

    def counting(buffers):
        counts.append(len(buffers))
        return copy_all(buffers)

    monkeypatch.setattr("revcore.replay.copy_all", counting)
    x = torch.randn(6, 8)
    torch.testing.assert_close(step_of(chain, x), step_of(chain, x))
    assert list(counts) == [1, 1, 0, 0]


class Permuted(nn.Module):
    """Has buffers that are hard to compare."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.eye(8).roll(1, 0))
        self.register_buffer("unknown", torch.full((3,), torch.nan))

    def forward(self, x):
        return x @ self.matrix

    def inverse(self, y):
        return y @ self.matrix.T


@pytest.mark.filterwarnings("error")
def test_an_invertible_module_that_leaves_buffers_alone_keeps_nothing(x):
    chain = revcore.ReversibleSequential(Permuted(), revcore.ReversibleBlock(nn.Linear(4, 4)))
    step_of(chain.double().to(x.device), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("training", [False, True])
def test_scripted_batch_norm(training, x):
    norm = torch.jit.script(nn.BatchNorm1d(4).train(training))
    block = revcore.ReversibleBlock(nn.Linear(4, 4), norm).double().to(x.device)
    if training:
        with pytest.raises(RuntimeError, match="has a ScriptModule"):
            step_of(block, x)
        return
    found = step_of(block, x)
    torch.testing.assert_close(found, step_of(revcore.set_reversing(block, False), x))
