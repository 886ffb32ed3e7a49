"""Several threads: over nets of their own, over one graph, beside some that draw numbers."""

import copy
import itertools
import threading

import pytest
import torch
from cases import loss_of, make_case
from torch import nn

import revcore


def test_two_nets_in_two_threads(device):
    def make(seed):
        torch.manual_seed(seed)
        branches = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(2))
        blocks = (revcore.ReversibleBlock(branch) for branch in branches)
        chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
        return chain, torch.randn(6, 8, dtype=torch.float64, device=device)

    def train(chain, x):
        for _ in range(20):
            loss_of(chain(x)).backward()

    alone, together = ([make(seed) for seed in (1, 2)] for _ in range(2))
    for net in alone:
        train(*net)
    threads = [threading.Thread(target=train, args=net) for net in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (chain, _), (twin, _) in zip(alone, together, strict=True):
        for a, b in zip(chain.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["deterministic", "dropout"])
@pytest.mark.parametrize("passes", ["forward", "both"])
def test_random_numbers_drawn_by_another_thread(device, passes, p):
    """They are no matter for a branch that draws none, and seen where they are in the way."""

    class DrawsMeanwhile(nn.Linear):
        """Stands for a thread that loads data while this branch runs."""

        numbers = itertools.count(3) if passes == "both" else iter([3, 3])

        def forward(self, x):
            number = next(self.numbers, 0)
            if number:
                thread = threading.Thread(target=torch.rand, args=(number,))
                thread.start()
                thread.join()
            return torch.nn.functional.dropout(super().forward(x), p) if p else super().forward(x)

    torch.manual_seed(0)
    block = revcore.ReversibleBlock(DrawsMeanwhile(4, 4), coupling="additive").to(device)
    twin = revcore.set_reversing(copy.deepcopy(block), False)
    x = torch.randn(2, 8, device=device)
    loss = block(x).sum()
    # On a GPU, dropout draws from another generator than that thread. Only a repetition that cannot
    # tell whose the draws were is refused.
    if p and (device.type == "cpu" or passes == "both"):
        with pytest.raises(RuntimeError, match="another thread"):
            loss.backward()
        return
    loss.backward()
    if not p:
        twin(x).sum().backward()
        for a, b in zip(block.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_dropout_in_two_threads_agrees_with_its_own_forward(device):
    """Each thread's gradient must belong to the masks that its own forward drew."""

    def work(errors):
        # y = x1 + c * dropout(x2), so that dy/dx2 is c times the mask that the forward applied.
        block = revcore.ReversibleBlock(nn.Dropout(0.5), nn.Dropout(0.5)).to(device)
        for _ in range(50):
            x = torch.ones(4, 64, device=device, requires_grad=True)
            y1, _ = block(*x.chunk(2, 1))
            mask = y1.detach() - 1
            (grad,) = torch.autograd.grad(y1.sum(), x)
            errors.append(float((grad[:, 32:] - mask).abs().max()))

    errors = []
    threads = [threading.Thread(target=work, args=(errors,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 150
    assert max(errors) == 0


def test_eight_threads_over_one_graph(device):
    case = make_case("additive", "conv2d", 4, device)
    x = case.x.clone().requires_grad_()
    loss = loss_of(case.chain(x))
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    results = []

    def work():
        results.append(torch.autograd.grad(loss, x, retain_graph=True)[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        torch.testing.assert_close(result, expected)
