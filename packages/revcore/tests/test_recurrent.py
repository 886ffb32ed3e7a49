"""Branches with torch's recurrent layers, whose weights cuDNN wants in one piece."""

import pytest
import torch
from cases import assert_as_stored, chain_of_branches, step_of
from torch import nn

import revcore


class Recurrent(nn.Module):
    def __init__(self, kind, dropout=0.0):
        super().__init__()
        self.layers = kind(4, 4, num_layers=2, batch_first=True, dropout=dropout)

    def forward(self, x, shift=0):
        return self.layers(x + shift)[0]


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(3, 8, 4, dtype=torch.float64, device=device)


def hooked(net, x):
    handles = [p.register_hook(lambda grad: grad * 2) for p in net.parameters()]
    found = step_of(net, x)
    for handle in handles:
        handle.remove()
    return found


def shifted(net, x):
    shift = torch.ones(4, dtype=x.dtype, device=x.device, requires_grad=True)
    y = net(x, shift=shift)
    return [y, *torch.autograd.grad(y.square().sum(), [shift, *net.parameters()])]


def retained(net, x):
    y = net(x.detach().requires_grad_())
    wanted = list(net.parameters())
    return [
        *torch.autograd.grad(y.square().sum(), wanted, retain_graph=True),
        *torch.autograd.grad(y.sum(), wanted),
    ]


def with_other_weights(net, x):
    others = {name: (p * 1.5).detach().requires_grad_() for name, p in net.named_parameters()}
    y = torch.func.functional_call(net, others, (x,))
    return [y, *torch.autograd.grad(y.square().sum(), list(others.values()))]


@pytest.fixture
def flattened(monkeypatch):
    """Lets the layers move their weights on the CPU, too, as far as one can see from outside."""

    def flatten(self):
        with torch.no_grad():
            for weight in self._flat_weights:
                weight.add_(0)

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("take", [step_of, hooked, shifted, retained, with_other_weights])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.usefixtures("flattened")
def test_weights_that_are_moved(kind, take, x):
    assert_as_stored(lambda: chain_of_branches(Recurrent(kind)), x, take)


def test_dropout(x):
    with torch.backends.cudnn.flags(enabled=False):
        assert_as_stored(lambda: chain_of_branches(Recurrent(nn.GRU, dropout=0.5)), x)


def test_dropout_of_cudnn_is_refused(device, x):
    if device.type != "cuda":
        pytest.skip("cuDNN needs --device cuda")
    chain = chain_of_branches(Recurrent(nn.LSTM, dropout=0.5)).double().to(device)
    with pytest.raises(RuntimeError, match="branch Recurrent has a recurrent layer with dropout"):
        chain(x)
    chain.eval()(x)
    assert revcore.set_reversing(chain.train(), False)(x).shape == x.shape
