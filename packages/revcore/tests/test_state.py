"""What branches hold and change as they run, and what others change before the backward pass."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import chain_of_branches, step_of
from torch import nn
from torch.nn.utils import prune

import revcore


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(6, 8, dtype=torch.float64, device=device)


def assert_as_stored(make, x, take=step_of, steps=2):
    """Takes steps with a chain and with its stored twin; gradients and buffers agree."""
    torch.manual_seed(0)
    chain = make().double().to(x.device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for number in range(steps):
        found = []
        for net in (chain, twin):
            torch.manual_seed(number)
            found.append([*take(net, x), *(b.double() for b in net.buffers())])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    return chain


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
        self.register_buffer("mask", torch.ones(200, 200))
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("places", torch.arange(512).view(2, 256))
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

    small = torch.tensor(1.0).nbytes + torch.arange(512).nbytes
    assert kept(8) - kept(2) == 12 * small


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, condition):
        condition.setdefault("seen", []).append(1)
        return self.linear(x) * condition["scale"][0]


@pytest.mark.parametrize("recomputed", [False, True])
def test_tensors_inside_of_arguments_get_their_gradients(recomputed, x):
    def take(net, x):
        scale = torch.rand(4, dtype=x.dtype, device=x.device, requires_grad=True)
        condition = {"scale": [scale]}
        if recomputed:
            branch = net[0].coupling.f
            y = revcore.recompute(branch, x[:, :4], condition=condition) if net.reversing else None
            y = branch(x[:, :4], condition=condition) if y is None else y
        else:
            y = net(x, condition=condition)
        condition["scale"] = [2 * scale]  # for another call, say
        net.zero_grad()
        y.square().sum().backward()
        # The branches have run once, as far as the caller can see.
        seen = torch.tensor(len(condition["seen"]))
        return [scale.grad, seen, *(p.grad for p in net[0].coupling.f.parameters())]

    assert_as_stored(lambda: chain_of_branches(Conditioned()), x, take)


def test_a_tensor_inside_of_an_argument_that_is_changed(x):
    chain = chain_of_branches(Conditioned()).double().to(x.device)
    scale = torch.ones(4, dtype=x.dtype, device=x.device)
    y = chain(x.requires_grad_(), condition={"scale": [scale]})
    scale.add_(1)
    with pytest.raises(RuntimeError, match="argument 'condition' was changed in place"):
        y.sum().backward()


class Handing(Conditioned):
    """Leaves its result where the next branch reads it."""

    def forward(self, x, *, condition):
        y = super().forward(x, condition=condition)
        condition["scale"] = [y]
        return y


def test_a_result_that_is_handed_on_in_an_argument(x):
    chain = chain_of_branches(Handing()).double().to(x.device)
    scale = torch.ones(4, dtype=x.dtype, device=x.device)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        chain(x.requires_grad_(), condition={"scale": [scale]}).sum().backward()


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


def hook_and_remove(module):
    return module.register_forward_hook(lambda *a: a[2] * 2)


def hook_with_arguments_and_remove(module):
    hook = lambda _module, _args, kwargs, y: y * (2 + len(kwargs))  # noqa: E731
    return module.register_forward_hook(hook, with_kwargs=True)


def hook_before_and_remove(module):
    return module.register_forward_pre_hook(lambda *a: (a[1][0] + 1,))


def hook_backward_and_remove(module):
    return module.register_full_backward_hook(lambda *a: (2 * a[1][0],))


class Patch:
    """A forward that is another one for a while."""

    def __init__(self, module):
        self.module, forward = module, module.forward
        module.forward = lambda x: 3 * forward(x)

    def remove(self):
        del self.module.forward


@pytest.mark.parametrize(
    "change",
    [
        hook_and_remove,
        hook_with_arguments_and_remove,
        hook_before_and_remove,
        hook_backward_and_remove,
        Patch,
    ],
)
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_code_that_is_changed_between_forward_and_backward(change, during, x):
    def take(net, x):
        changed = [] if during == "backward" else [change(block.coupling.f) for block in net]
        net.zero_grad()
        y = net(x.detach().requires_grad_()).square().sum()
        for each in changed:
            each.remove()
        if during == "backward":
            changed = [change(block.coupling.f) for block in net]
        y.backward()
        if during == "backward":
            for each in changed:
                each.remove()
        return [p.grad for p in net.parameters()]

    chain = assert_as_stored(lambda: chain_of_branches(nn.Linear(4, 4)), x, take)
    assert not any(block.coupling.f._forward_hooks for block in chain)
    assert not any("forward" in vars(block.coupling.f) for block in chain)


def test_a_hook_on_all_modules_may_draw(x):
    def hook(module, _inputs, y):
        return F.dropout(y, 0.5) if isinstance(module, nn.Linear) else None

    with nn.modules.module.register_module_forward_hook(hook):
        assert_as_stored(lambda: chain_of_branches(nn.Linear(4, 4)), x)


def test_a_weight_that_another_net_makes_later(x):
    chain = chain_of_branches(nn.Linear(4, 4)).double().to(x.device)
    linear = chain[0].coupling.f
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight
    step_of(chain, x)
    linear.weight = weight.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="would get no gradient"):
        step_of(chain, x)


def test_a_result_of_a_higher_precision_than_its_stream(x):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x.float()).double()

    class Narrow(nn.Linear):
        def forward(self, x):
            assert x.dtype == torch.float32
            return super().forward(x)

    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Narrow(4, 4), Wide())).to(x.device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for one, two in zip(step_of(chain, x.float()), step_of(twin, x.float()), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_what_a_jit_trace_sees_is_stored(x):
    chain = chain_of_branches(nn.Linear(4, 4)).double().to(x.device)
    traced = torch.jit.trace(chain, x)
    torch.testing.assert_close(traced(x), chain(x))


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


def test_a_parameter_that_is_pruned_before_backward(x):
    chain = chain_of_branches(nn.Linear(4, 4)).double().to(x.device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    found = []
    for net in (chain, twin):
        y = net(x.requires_grad_())
        linear = net[0].coupling.f
        weight = linear.weight
        prune.random_unstructured(linear, "weight", amount=0.5)
        y.square().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


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
