"""What users set, call or run between and around the two runs of a branch."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import revcore


def linear():
    return nn.Linear(4, 4)


def loss_of(y):
    return (y.sin() * torch.linspace(0.5, 1.5, y.numel()).to(y).view_as(y)).sum()


def chain_with(branch, device, depth=2):
    torch.manual_seed(0)
    blocks = (revcore.ReversibleBlock(branch(), branch()) for _ in range(depth))
    return revcore.ReversibleSequential(*blocks).to(device, torch.float64)


def inputs(device, batch=5):
    torch.manual_seed(1)
    return torch.randn(batch, 8, dtype=torch.float64, device=device)


def gradients(net, run):
    """The gradients that `run` gives to a net, reversed and stored."""
    found = []
    for reversing in (True, False):
        revcore.set_reversing(net, reversing)
        net.zero_grad()
        torch.manual_seed(3)
        run(net)
        found.append([parameter.grad for parameter in net.parameters()])
    return found


class Switch(nn.Module):
    """Two layers, of which one is active, as with adapters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.active = 0

    def forward(self, x):
        return torch.tanh(self.drop(self.layers[self.active](x)))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = linear(), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


def set_all(net, kind, name, value):
    for module in net.modules():
        if isinstance(module, kind):
            setattr(module, name, value)


def test_attributes_that_are_set_between_forward_and_backward(device):
    net, x = chain_with(Switch, device), inputs(device)

    def run(net):
        set_all(net, Switch, "active", 0)
        set_all(net, nn.Dropout, "p", 0.5)
        y = net(x)
        set_all(net, Switch, "active", 1)
        set_all(net, nn.Dropout, "p", 0.1)
        z = net(x)
        (loss_of(y) * loss_of(z)).backward()
        assert {m.active for m in net.modules() if isinstance(m, Switch)} == {1}

    torch.testing.assert_close(*gradients(net, run))


def test_a_branch_that_counts_its_calls(device):
    net, x = chain_with(Counts, device), inputs(device)

    def run(net):
        set_all(net, Counts, "calls", 0)
        (loss_of(net(x)) + loss_of(net(x * 2))).backward()
        assert {m.calls for m in net.modules() if isinstance(m, Counts)} == {2}

    torch.testing.assert_close(*gradients(net, run))


def _noisy(layer, x, weight, bias):
    assert not layer.transposed
    return F.conv1d(x, weight + 0.3 * torch.randn_like(weight), bias)


def test_arithmetic_of_torchs_layers_that_is_replaced(device):
    def conv():
        layer = nn.Conv1d(4, 4, 1)
        layer._conv_forward = types.MethodType(_noisy, layer)
        return layer

    x = inputs(device)[..., None]
    run = lambda net: loss_of(net(x)).backward()  # noqa: E731
    torch.testing.assert_close(*gradients(chain_with(conv, device), run))


def test_arithmetic_that_is_replaced_after_a_step(device):
    net, x = chain_with(lambda: nn.Conv1d(4, 4, 1), device), inputs(device)[..., None]
    loss_of(net(x)).backward()
    for layer in filter(lambda module: isinstance(module, nn.Conv1d), net.modules()):
        layer._conv_forward = types.MethodType(_noisy, layer)
    torch.testing.assert_close(*gradients(net, lambda net: loss_of(net(x)).backward()))


def test_a_class_of_torch_that_is_changed(device, monkeypatch):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + torch.randn_like(x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    x = inputs(device)
    run = lambda net: loss_of(torch.sin(net(x))).backward()  # noqa: E731
    torch.testing.assert_close(*gradients(chain_with(linear, device), run))


@pytest.mark.parametrize("chain", [True, False])
def test_backward_in_inference_mode(chain, device):
    net, x = chain_with(linear, device), inputs(device).requires_grad_()
    found = []

    def run(net):
        x.grad = None
        f = net[0].coupling.f
        if chain:
            loss = loss_of(net(x))
        else:
            loss = loss_of(revcore.recompute(f, x[:, :4]) if net.reversing else f(x[:, :4]))
        with torch.inference_mode():
            loss.backward()
        found.append(x.grad)

    torch.testing.assert_close(*gradients(net, run))
    torch.testing.assert_close(*found)


class Guided(nn.Module):
    """Differentiates a reversible chain in its own forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = linear()
        self.energy = revcore.ReversibleSequential(
            *(revcore.ReversibleBlock(nn.Linear(2, 2)) for _ in range(2))
        ).requires_grad_(False)

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (guide,) = torch.autograd.grad(self.energy(z).square().sum(), z)
        return torch.tanh(self.layer(x) + guide)


def test_a_branch_that_differentiates_a_chain(device):
    x = inputs(device)
    net = chain_with(lambda: nn.Sequential(Guided(), nn.Dropout(0.5)), device)
    torch.testing.assert_close(*gradients(net, lambda net: loss_of(net(x)).backward()))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(linear(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh())

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_torchs_checkpoint_around_a_batch_norm(device):
    nets = [chain_with(Checkpointed, device) for _ in range(2)]
    for net, reversing in zip(nets, (True, False), strict=True):
        revcore.set_reversing(net, reversing)
        torch.manual_seed(3)
        loss_of(net(inputs(device))).backward()
    for parameters in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(*(parameter.grad for parameter in parameters))
    # A batch norm that checkpoint repeats counts that step, too, reversed or stored.
    for buffers in zip(*(net.buffers() for net in nets), strict=True):
        torch.testing.assert_close(*buffers)


def test_quantization_aware_training():
    """Observers give their buffers other sizes, uncounted."""
    net = chain_with(lambda: nn.Sequential(linear(), nn.ReLU()), "cpu").float()
    net.qconfig = get_default_qat_qconfig("x86")
    prepare_qat(net, inplace=True)
    x = inputs("cpu").float()
    nets = [net, revcore.set_reversing(copy.deepcopy(net), False)]
    for one in nets:
        for _ in range(2):
            loss_of(one(x)).backward()
    for a, b in zip(net.parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(net.buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)


class Elsewhere(nn.Module):
    """Computes on another device than its streams are on."""

    def __init__(self, device):
        super().__init__()
        self.inner = nn.Sequential(linear(), nn.Dropout(0.5), nn.Tanh()).to(device)
        self.device = device

    def forward(self, x):
        return self.inner(x.to(self.device)).to(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_branches_on_another_device(autocast, device):
    torch.manual_seed(0)
    blocks = (revcore.ReversibleBlock(Elsewhere(device), Elsewhere(device)) for _ in range(3))
    net, x = revcore.ReversibleSequential(*blocks), inputs("cpu").float()

    def run(net):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = net(x)
        loss_of(y).backward()

    tolerance = 3e-2 if autocast else 1e-4  # inputs of the second run are reconstructed
    torch.testing.assert_close(*gradients(net, run), rtol=tolerance, atol=tolerance)


class Decides(nn.Module):
    """Lets chance decide once, and draws other numbers after that."""

    less = False

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        y = self.layer(x)
        if self.less and not y.requires_grad:
            revcore.remember(lambda: (torch.ones(1),))
        (scale,) = revcore.remember(lambda: (torch.rand(3, device=x.device),))
        return F.dropout(y, 0.5) * scale[0]


def test_chance_that_is_remembered(device):
    x = inputs(device)
    run = lambda net: loss_of(net(x)).backward()  # noqa: E731
    torch.testing.assert_close(*gradients(chain_with(Decides, device), run))


def test_a_repetition_that_remembers_less(device, monkeypatch):
    monkeypatch.setattr(Decides, "less", True)
    loss = loss_of(chain_with(Decides, device)(inputs(device)))
    with pytest.raises(RuntimeError, match="remember less often when it is repeated"):
        loss.backward()


class InPlace(revcore.Coupling):
    def combine(self, a, t):
        return a + t

    def uncombine(self, a, t):
        return a.sub_(t)


def test_a_scheme_that_changes_its_stream_in_place(device):
    net = revcore.ReversibleSequential(InPlace(linear(), linear())).to(device, torch.float64)
    loss = loss_of(net(inputs(device)))
    with pytest.raises(RuntimeError, match=r"InPlace.uncombine changes its first argument in"):
        loss.backward()


@pytest.mark.parametrize("wrong", ["column", "whole", "float"])
@pytest.mark.parametrize("scheme", [True, False])
def test_log_determinants_of_other_shapes(scheme, wrong, device):
    def spoil(x):
        return {"column": x.new_zeros(len(x), 1), "whole": x, "float": 0.5}[wrong]

    class Affine(revcore.AffineCoupling):
        def log_det(self, a, t):
            return spoil(a)

    class Turn(nn.Module):
        def forward(self, x):
            return -x

        inverse = forward

        def log_det(self, x):
            return spoil(x)

    block = Affine(linear(), linear()) if scheme else Turn()
    net = revcore.ReversibleSequential(block, log_det=True).to(device, torch.float64)
    with pytest.raises(ValueError, match=rf"log_det of {type(block).__name__} must .*\(5,\), got"):
        net(inputs(device))


def test_sparse_tensors_are_not_counted():
    with revcore.track_memory() as memory:
        kept = torch.eye(4).to_sparse() @ torch.randn(4, 4)
    assert memory.live_bytes >= kept.untyped_storage().nbytes()
    with revcore.track_memory():
        assert (torch.eye(4).to_sparse_csr() @ torch.randn(4, 4)).shape == (4, 4)


def test_what_is_no_coupling():
    f = linear()
    for coupling in (revcore.AdditiveCoupling(f, f), None, 3):
        with pytest.raises(TypeError, match="coupling must be a name, or a function"):
            revcore.ReversibleBlock(f, f, coupling=coupling)
    with pytest.raises(TypeError, match="x must be one tensor, got tuple"):
        revcore.recompute(f, (torch.zeros(2, 4),))
    with pytest.raises(TypeError, match="module must be a class of modules, got Linear"):
        revcore.self_contained(f)
