"""What branches are given, and what others change before the backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_stored, chain_of_branches, step_of
from torch import nn
from torch.nn.utils import prune

import revcore


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(6, 8, dtype=torch.float64, device=device)


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


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_a_net_that_is_frozen_for_the_forward_pass_alone(device):
    """As the discriminator in the step of a generator."""

    def take(net, z):
        found = step_of(net, z)
        net.zero_grad()
        net.requires_grad_(False)
        z = z.clone().requires_grad_()
        loss = net(z).square().mean()
        net.requires_grad_(True)
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.99)
        return [*found, z.grad]

    def make():
        chain = chain_of_branches(Attention())
        chain.split_dim = -1
        return chain

    z = torch.randn(2, 5, 64, dtype=torch.float64, device=device)
    assert_as_stored(make, z, take, steps=3)


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
