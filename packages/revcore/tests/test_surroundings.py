"""What decides, outside of modules, which code runs: both runs of a branch have it."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import Log, assert_as_stored, chain_of_branches, mlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import revcore
from revcore.hooks import has_global_hooks


class Rounding(TorchFunctionMode):
    """Simulates weights of low precision, with the gradient of the others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = args
            args = x, weight + ((4 * weight).round() / 4 - weight).detach(), bias
        return func(*args, **(kwargs or {}))


class Noise(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y + torch.randn_like(y) if func is F.linear else y


class NoiseBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y + torch.randn_like(y) if func is torch.ops.aten.addmm.default else y


class NoisyWeight(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                x, weight, bias = args
                weight = weight.as_subclass(torch.Tensor)
                args = x, weight + torch.randn_like(weight), bias
            return func(*args, **(kwargs or {}))


class NoisyTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs)
        return y + torch.randn_like(y) if func is torch.tanh else y


class Wrapped(nn.Module):
    """A class of which nothing is known."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


CHAINS = {
    "known": lambda: chain_of_branches(mlp(4, 4)),
    "unknown": lambda: chain_of_branches(Wrapped(mlp(4, 4))),
}


def take(mode, around_backward):
    def step(net, x):
        net.zero_grad()
        x = x.detach().requires_grad_()
        with mode():
            loss = net(x).square().sum()
            if around_backward:
                loss.backward()
        if not around_backward:
            loss.backward()
        found = [loss, x.grad, *(p.grad for p in net.parameters())]
        return [t.as_subclass(torch.Tensor) for t in found]

    return step


@pytest.mark.parametrize("branches", CHAINS)
@pytest.mark.parametrize("around_backward", [False, True])
@pytest.mark.parametrize("mode", [Rounding, Noise])
def test_function_modes(mode, around_backward, branches, device):
    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    assert_as_stored(CHAINS[branches], x, take(mode, around_backward))


@pytest.mark.parametrize("branches", CHAINS)
def test_a_dispatch_mode_that_draws(branches, device):
    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    assert_as_stored(CHAINS[branches], x, take(NoiseBelow, True))


@pytest.mark.parametrize("branches", CHAINS)
def test_weights_that_draw(branches, device):
    def step(net, x):
        for module in net.modules():
            if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter:
                module.weight = NoisyWeight(module.weight.detach())
        return take(nullcontext, True)(net, x)

    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    assert_as_stored(CHAINS[branches], x, step)


@pytest.mark.parametrize("branches", CHAINS)
def test_an_input_that_draws(branches, device):
    x = torch.randn(5, 8, dtype=torch.float64, device=device).as_subclass(NoisyTensor)
    assert_as_stored(CHAINS[branches], x, take(nullcontext, True))


class Positions(nn.Module):
    """Makes tensors without saying where."""

    def __init__(self):
        super().__init__()
        self.linear, self.embedding = nn.Linear(4, 4), nn.Embedding(4, 1)

    def forward(self, x):
        mask = torch.rand(x.shape, dtype=x.dtype) < 0.7
        return self.linear(x) * mask + self.embedding(torch.arange(4)).T


@pytest.mark.parametrize("make", [revcore.ReversibleSequential, Wrapped])
def test_the_default_device(make, device):
    other = torch.device("meta") if device.type == "cpu" else device
    with other:
        block = revcore.ReversibleBlock(Positions())
        net = make(block)
        x = torch.randn(5, 8, requires_grad=True)
    torch.set_default_device(other)
    try:
        loss = net(x).square().sum()
    finally:
        torch.set_default_device(None)
    loss.backward()
    assert x.grad.device.type == other.type
    assert torch.zeros(1).device.type == "cpu"


def test_modes_are_as_before_after_an_error(device):
    class Fails(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise ValueError("on purpose")
            return x

    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Fails())).to(device)
    with Rounding() as mode:
        loss = chain(torch.randn(5, 8, device=device, requires_grad=True)).sum()
    with Noise() as other:
        with pytest.raises(ValueError, match="on purpose"):
            torch.autograd.backward([loss], [torch.ones_like(loss)])
        assert torch.overrides._get_current_function_mode_stack() == [other]
    assert mode not in torch.overrides._get_current_function_mode_stack()


class Attention(nn.Module):
    def __init__(self, kernels):
        super().__init__()
        self.linear, self.kernels = nn.Linear(16, 48), kernels

    def forward(self, x):
        enabled = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        self.kernels.append((enabled, torch._C._get_sdp_priority_order()))
        q, k, v = self.linear(x).unflatten(-1, (6, 8)).transpose(1, 2).chunk(3, 1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_the_kernels_of_attention(device):
    """Others give other bits, and on a GPU other masks of dropout."""
    kernels = Log()
    block = revcore.ReversibleBlock(Attention(kernels), split_dim=-1, coupling="fixed_point")
    chain = revcore.ReversibleSequential(block, split_dim=-1).to(device)
    block.coupling.f.kernels = block.coupling.g.kernels = kernels
    usual = torch._C._get_sdp_priority_order()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        loss = chain(torch.randn(3, 64, 32, device=device)).square().sum()
    loss.backward()
    (enabled, order), *others = kernels
    assert enabled == (False, True)
    assert order != usual
    assert others == 3 * [(enabled, order)]
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == usual


def halve(module, _x, y):
    return 0.5 * y if isinstance(module, nn.Linear) else None


def halve_gradient(module, grads, _of_y):
    return tuple(0.5 * grad for grad in grads) if isinstance(module, nn.Linear) else None


@pytest.mark.parametrize("around", ["forward", "backward"])
@pytest.mark.parametrize(
    "register",
    [
        lambda: nn.modules.module.register_module_forward_hook(halve),
        lambda: nn.modules.module.register_module_full_backward_hook(halve_gradient),
    ],
)
def test_hooks_on_all_modules_around_one_pass(register, around, device):
    def step(net, x):
        net.zero_grad()
        x = x.detach().requires_grad_()
        hook = register() if around == "forward" else None
        loss = net(x).square().sum()
        hook = register() if hook is None else hook.remove()
        loss.backward()
        if hook is not None:
            hook.remove()
        return [loss, x.grad, *(p.grad for p in net.parameters())]

    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    assert_as_stored(CHAINS["known"], x, step)
    assert not has_global_hooks()
