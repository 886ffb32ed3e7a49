"""What the modules of branches hold beside parameters and buffers, and what becomes of it."""

import copy
import gc
import weakref
from collections import Counter, defaultdict, deque

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_stored, chain_of_branches, step_of
from torch import nn

import revcore


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(6, 8, dtype=torch.float64, device=device)


class Keeps(nn.Module):
    """Has a tensor in an attribute, which it changes, replaces or fills as a memory of its own."""

    def __init__(self, how, size):
        super().__init__()
        self.linear, self.how, self.size = nn.Linear(4, 4), how, size
        self.state = None

    def forward(self, x):
        if self.state is None:
            self.state = x.new_ones(self.size)
        elif self.how == "in place":
            self.state += 1
        elif self.how == "replaced":
            self.state = self.state + self.linear(x).detach().mean()
        return self.linear(x) * self.state[0]


@pytest.mark.parametrize("how", ["in place", "replaced", "left alone"])
@pytest.mark.parametrize("size", [4, 2**14])
def test_tensors_in_attributes(how, size, x):
    chain = assert_as_stored(lambda: chain_of_branches(Keeps(how, size)), x, steps=3)
    twin = copy.deepcopy(chain)
    step_of(chain, x)
    step_of(revcore.set_reversing(twin, False), x)
    for one, two in zip(chain.modules(), twin.modules(), strict=True):
        if isinstance(one, Keeps):
            torch.testing.assert_close(one.state, two.state)


class Pooled(nn.Module):
    """Notes in its forward pass what its inverse has to know."""

    shape = None

    def forward(self, x):
        self.shape = x.shape
        return x.flatten(2).flip(2)

    def inverse(self, y):
        return y.flip(2).view(self.shape)


def test_what_a_forward_pass_notes_for_the_inverse(device):
    torch.manual_seed(0)
    chain = revcore.ReversibleSequential(
        revcore.ReversibleBlock(nn.Conv2d(2, 2, 3, padding=1)),
        Pooled(),
        revcore.ReversibleBlock(nn.Conv1d(2, 2, 3, padding=1)),
    ).to(device, torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for size in (3, 5):
        x = torch.randn(2, 4, size, size, dtype=torch.float64, device=device)
        for one, two in zip(step_of(chain, x), step_of(twin, x), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    # A call in between changes what the module notes, but not what this call has noted.
    x, other = (torch.randn(2, 4, n, n, dtype=torch.float64, device=device) for n in (4, 6))
    found = []
    for net in (chain, twin):
        y = net(x)
        net(other)
        found.append(torch.autograd.grad(y.square().sum(), list(net.parameters())))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


class Logs(nn.Module):
    """Keeps numbers and results in containers that are attributes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.state, self.losses, self.cache = {"n": 0}, [], {}
        self.weights = [self.linear.weight]

    def forward(self, x):
        self.state["n"] += 1
        self.losses.append(float(x.detach().sum()))
        noise = self.cache.setdefault("noise", torch.rand_like(x[:1]))
        y = F.dropout(self.linear(x), 0.5, self.training)
        return (y + x @ self.weights[0]) * self.state["n"] + noise * len(self.losses)


def test_dicts_and_lists_in_attributes(x):
    def hook_weights(net, x):
        for branch in net.modules():
            if isinstance(branch, Logs) and not branch.linear.weight._backward_hooks:
                branch.weights = [branch.linear.weight]  # a deep copy has one of its own
                branch.linear.weight.register_hook(lambda grad: grad * 2)
        return step_of(net, x)

    chain = assert_as_stored(lambda: chain_of_branches(Logs()), x, take=hook_weights, steps=3)
    assert all(m.state["n"] == len(m.losses) == 3 for m in chain.modules() if isinstance(m, Logs))


class Notes(nn.Module):
    """Holds a list or a dict that somebody else holds, too."""

    def __init__(self, notes):
        super().__init__()
        self.linear, self.notes = nn.Linear(4, 4), notes

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("notes", [["one"], {"one": 1}])
def test_what_two_modules_share_keeps_what_is_noted_between_forward_and_backward(notes, x):
    shared = copy.copy(notes)
    chain = chain_of_branches(nn.Sequential(Notes(shared), Notes(shared))).to(x)
    loss = chain(x).sum()
    branch = chain[0].coupling.f
    branch[0].notes.clear()
    loss.backward()
    assert not branch[0].notes
    assert branch[1].notes is branch[0].notes


class ReadsStatistics(nn.Module):
    """Uses a batch norm's statistics, and changes them, around it or in its place."""

    def __init__(self, how):
        super().__init__()
        self.norm, self.how = nn.BatchNorm1d(4), how

    def forward(self, x):
        if self.how == "reads":
            return self.norm(x) * self.norm.running_var.sqrt()
        mean, var = self.norm.running_mean, self.norm.running_var
        return F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, training=True) + var


@pytest.mark.parametrize("how", ["reads", "in its place"])
def test_code_that_reads_the_statistics_of_a_batch_norm(how, x):
    assert_as_stored(lambda: chain_of_branches(ReadsStatistics(how)), x, steps=3)


class Normalizes(nn.Module):
    """A flow's step, whose inverse uses statistics that its forward pass changes uncounted."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        self.norm(x)
        return (x - self.norm.running_mean) / (1 + self.norm.running_var).sqrt()

    def inverse(self, y):
        return y * (1 + self.norm.running_var).sqrt() + self.norm.running_mean


@pytest.mark.filterwarnings("ignore:Normalizes draws random numbers or changes buffers")
def test_an_inverse_that_uses_statistics_of_a_batch_norm(x):
    block = revcore.ReversibleBlock(nn.Linear(4, 4))
    assert_as_stored(lambda: revcore.ReversibleSequential(block, Normalizes()), x, steps=3)


class CachesItsInverse(nn.Module):
    """Makes its inverse matrix when it is first asked for, and forgets it with `train()`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8) + 0.1)
        self.found = None

    def train(self, mode=True):
        self.found = None
        return super().train(mode)

    def forward(self, x):
        return x @ self.weight

    def inverse(self, y):
        if self.found is None:
            self.found = torch.linalg.inv(self.weight)
        return y @ self.found


def test_the_engines_own_runs_leave_nothing_behind(x):
    def train(net, x):
        found = step_of(net, x)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(0.01 * parameter.grad)
        return found

    def make():
        return revcore.ReversibleSequential(CachesItsInverse(), chain_of_branches(nn.Tanh(), 1))

    chain = assert_as_stored(make, x, take=train, steps=3)
    assert chain[0].found is None


class Permutes(nn.Module):
    """Draws a new permutation in each forward pass."""

    def forward(self, x):
        self.order = torch.randperm(8, device=x.device)
        return x[:, self.order]

    def inverse(self, y):
        return y[:, self.order.argsort()]


def test_a_way_back_that_draws_where_the_way_there_did_not(x):
    chain = revcore.ReversibleSequential(Permutes(), chain_of_branches(nn.Tanh(), 1)).double()
    chain.to(x.device)
    with pytest.warns(UserWarning, match="Permutes draws random numbers"):
        y = chain(x.requires_grad_())
    z = chain.inverse(y.detach().requires_grad_())
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        z.sum().backward()


@pytest.mark.parametrize("kept", ["in a tuple", "in a list", "weights"])
def test_what_was_replaced_is_not_kept_by_a_chain(kept, x):
    branch = nn.Sequential(nn.Linear(4, 4), Permits())
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch, nn.Tanh())).to(x)
    branch[1].cache = {"in a tuple": (torch.ones(4),), "in a list": [torch.ones(4)]}.get(kept)
    held = branch[0].weight if kept == "weights" else branch[1].cache[0]
    gone, enabled = weakref.ref(held), gc.isenabled()
    del held
    gc.disable()
    try:
        step_of(chain, x)
        branch[1].cache = None
        state = {name: value.detach().clone() for name, value in chain.state_dict().items()}
        chain.load_state_dict(state, assign=True)
        with torch.no_grad():
            chain(x)
        assert gone() is None
    finally:
        if enabled:
            gc.enable()


def test_weights_that_were_replaced_are_freed_block_by_block(device):
    chain = chain_of_branches(nn.Linear(32, 32), 3).to(device)
    x = torch.randn(2, 64, device=device)
    step_of(chain, x)
    gone, alive = weakref.ref(chain[0].coupling.f.weight), []
    state = {name: value.detach().clone() for name, value in chain.state_dict().items()}
    chain.load_state_dict(state, assign=True)
    chain[2].coupling.f.register_forward_pre_hook(lambda *_: alive.append(gone() is not None))
    chain(x)
    assert alive == [False]


class Permits(nn.Module):
    def forward(self, x):
        return x


def test_memory_that_is_replaced_twice_between_forward_and_backward(x):
    chain = chain_of_branches(nn.Linear(4, 4), 1).to(x)
    y = chain(x.requires_grad_())
    weight = chain[0].coupling.f.weight
    weight.data = weight.new_empty(0)
    weight.data = weight.new_ones(4, 4)  # may get the address of the first
    with pytest.raises(RuntimeError, match="'weight' of Linear was changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("change", ["class", "parametrized", "removed", "renamed"])
def test_classes_that_change_before_backward(change, x):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    chain = chain_of_branches(nn.Sequential(nn.Linear(4, 4), Named()), 1).to(x)
    branch = chain[0].coupling.f
    weight_norm = nn.utils.parametrizations.weight_norm
    if change == "removed":
        weight_norm(branch[0])
    expected = step_of(revcore.set_reversing(copy.deepcopy(chain), False), x)[1:]
    parameters = list(chain.parameters())
    y = chain(x.requires_grad_())
    if change == "class":
        branch[0].__class__ = Doubled
    elif change == "parametrized":
        weight_norm(branch[0])
    elif change == "renamed":
        branch[1].other = vars(branch[1]).pop("factor")
    else:
        nn.utils.parametrize.remove_parametrizations(branch[0], "weight")
        with pytest.raises(RuntimeError, match="as if a parametrization had been removed"):
            y.sum().backward()
        return
    found = torch.autograd.grad(y.square().sum(), [x, *parameters])
    torch.testing.assert_close(list(found), expected, rtol=1e-9, atol=1e-9)
    assert type(branch[0]).__name__ == {"class": "Doubled", "renamed": "Linear"}.get(
        change, "ParametrizedLinear"
    )


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 2.5

    def forward(self, x):
        return x * getattr(self, "factor", 1.0)


class Toggles(nn.Module):
    """Switches off the dropout that is the other branch."""

    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        self.drop.p = 0.5 if self.drop.p == 0.0 else 0.0
        return torch.tanh(x)


def test_a_branch_that_changes_the_branch_after_it(x):
    def make():
        drop = nn.Dropout(0.5)
        return revcore.ReversibleSequential(revcore.ReversibleBlock(Toggles(drop), drop))

    assert_as_stored(make, x, steps=3)


class Deep(nn.Module):
    """Keeps numbers and tensors in containers inside of others, of all kinds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.state = {"ema": {"n": 0, "mean": torch.zeros(4)}, "pair": ([0], {"n": 0})}
        self.log = defaultdict(list)
        self.counts, self.window = Counter(), deque(maxlen=3)

    def forward(self, x):
        n = self.counts["runs"]
        ema = self.state["ema"]
        ema["n"] += 1
        ema["mean"] = ema["mean"].to(x) * 0.5 + x.detach().mean(0)
        self.state["pair"][0][0] += 1
        self.state["pair"][1]["n"] += 1
        self.log["norms"].append(float(x.detach().norm()))
        self.counts["runs"] += 1
        self.window.append(n)
        scale = ema["n"] + self.state["pair"][0][0] + self.state["pair"][1]["n"]
        scale += len(self.log["norms"]) + self.counts["runs"] + sum(self.window)
        return torch.tanh(self.linear(x + ema["mean"])) * scale


def test_containers_inside_of_containers(x):
    chain = assert_as_stored(lambda: chain_of_branches(Deep()), x, steps=5)
    for branch in (m for m in chain.modules() if isinstance(m, Deep)):
        assert branch.state["ema"]["n"] == len(branch.log["norms"]) == branch.counts["runs"] == 5
        assert list(branch.window) == [2, 3, 4]
        assert branch.state["pair"] == ([5], {"n": 5})


def test_a_log_of_many_entries(x):
    chain = chain_of_branches(Logs()).to(x)
    for branch in (m for m in chain.modules() if isinstance(m, Logs)):
        branch.losses += [0.0] * 5000
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    found = []
    for net in (chain, twin):
        torch.manual_seed(0)
        found.append([each for _ in range(2) for each in step_of(net, x)])
    torch.testing.assert_close(*found)
    assert len(chain[0].coupling.f.losses) == 5002
