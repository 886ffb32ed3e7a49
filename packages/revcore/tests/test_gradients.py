"""Gradients are those of plain autograd, in float64, for every scheme and kind of net."""

import copy
from functools import partial

import pytest
import torch
from cases import KINDS, SCHEMES, assert_same, gradients, loss_of, make_case
from torch import nn

import revcore


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("depth", [1, 4])
def test_gradients_equal_plain_autograd(scheme, kind, depth, device):
    case = make_case(scheme, kind, depth, device)
    twin = case.twin()
    ours = gradients(case.chain, case.chain, case.x)
    plain = gradients(lambda x: case.plain(x, twin), twin, case.x)
    assert_same(ours, plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_the_inverse_equal_plain_autograd(scheme, device):
    case = make_case(scheme, "mlp", 3, device)
    stored = revcore.set_reversing(case.twin(), False)
    ours = gradients(case.chain.inverse, case.chain, case.x)
    assert_same(ours, gradients(stored.inverse, stored, case.x))
    x = case.x.clone().requires_grad_()
    (through,) = torch.autograd.grad(loss_of(case.chain.inverse(case.plain(x))), x)
    (direct,) = torch.autograd.grad(loss_of(x), x)
    torch.testing.assert_close(through, direct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# The fixed-point coupling takes no half precision streams, and its grid is coarse in float32.
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "fixed-point"])
def test_gradients_in_low_precision_stay_close(scheme, dtype, device):
    case = make_case(scheme, "mlp", 2, device, dtype)
    twin = case.twin()
    ours = gradients(case.chain, case.chain, case.x)
    plain = gradients(lambda x: case.plain(x, twin), twin, case.x)
    assert ours["output"].dtype == dtype
    for name, expected in plain.items():
        error = (ours[name] - expected).float().norm() / expected.float().norm()
        assert error < 100 * torch.finfo(dtype).eps, name


def test_two_streams_in_two_streams_out(device):
    case = make_case("additive", "conv2d", 3, device)
    twin = case.twin()
    x1, x2 = (part.clone().requires_grad_() for part in case.x.chunk(2, 1))
    y1, y2 = case.chain(x1, x2)
    assert torch.equal(torch.cat((y1, y2), 1), case.plain(case.x, twin))
    grads = torch.autograd.grad(loss_of(torch.cat((y1, y2), 1)), (x1, x2))
    plain = gradients(lambda x: case.plain(x, twin), twin, case.x)
    torch.testing.assert_close(torch.cat(grads, 1), plain["input"])


@pytest.mark.parametrize("which", [0, 1])
def test_loss_of_one_stream_only(which, device):
    case = make_case("affine-exp", "mlp", 3, device)

    def one(function):
        return lambda x: function(x).chunk(2, case.split_dim)[which]

    def one_of_two(x):
        return case.chain(*x.chunk(2, case.split_dim))[which]

    twin = case.twin()
    plain = gradients(one(lambda x: case.plain(x, twin)), twin, case.x)
    assert_same(gradients(one(case.chain), case.chain, case.x), plain)
    ours = gradients(one_of_two, case.chain, case.x)
    for name, expected in plain.items():
        got = ours[name]  # None where the loss does not depend on a branch, not zeros
        got = torch.zeros_like(expected) if got is None else got
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("final_too", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_loss_of_an_intermediate_output(which, final_too, device):
    case = make_case("additive", "conv2d", 4, device)
    twin = case.twin()
    seen = []
    case.chain[1].register_forward_hook(lambda _module, _args, streams: seen.append(streams[which]))

    def ours(x):
        y = case.chain(x)
        tap = seen.pop()
        return torch.cat((tap.flatten(), y.flatten())) if final_too else tap

    def plain(x):
        tap = case.plain(x, twin[:2]).chunk(2, case.split_dim)[which]
        if not final_too:
            return tap
        return torch.cat((tap.flatten(), case.plain(x, twin).flatten()))

    mine, reference = gradients(ours, case.chain, case.x), gradients(plain, twin, case.x)
    for name, expected in reference.items():
        # Without the final output the reference never ran blocks 2 and 3: no statistics there.
        if name.startswith("buffer") and not final_too and name.split()[1][0] in "23":
            continue
        if name.startswith("buffer") and final_too and name.split()[1][0] in "01":
            continue  # the reference ran these blocks twice
        if expected is not None:
            got = mine[name]  # None where the loss does not depend on a branch, not zeros
            got = torch.zeros_like(expected) if got is None else got
            torch.testing.assert_close(got, expected)


def test_input_without_grad_and_frozen_prefix(device):
    case = make_case("additive", "conv2d", 4, device)
    case.chain[:2].requires_grad_(False)
    twin = case.twin()
    loss_of(case.chain(case.x)).backward()
    loss_of(case.plain(case.x, twin)).backward()
    for (name, ours), plain in zip(case.chain.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (name[0] in "01")
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("frozen", ["f", "g"])
def test_frozen_branch(frozen, device):
    case = make_case("affine-exp", "mlp", 3, device)
    for block in case.chain:
        getattr(block.coupling, frozen).requires_grad_(False)
    twin = case.twin()
    ours = gradients(case.chain, case.chain, case.x)
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, case.x))


def test_extra_arguments_get_their_gradients(device):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, condition, scale):
            return torch.tanh(self.linear(x) + condition) * scale

    blocks = [revcore.ReversibleBlock(Conditioned()) for _ in range(3)]
    chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    results = []
    for enabled in (True, False):
        revcore.set_reversing(chain, enabled)
        source = torch.ones(4, dtype=torch.float64, device=device, requires_grad=True)
        condition = source * 2  # not a leaf
        y = chain(x, condition=condition, scale=0.5)
        results.append(torch.autograd.grad(loss_of(y), [source, *chain.parameters()]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_shared_branches_and_parameters(device):
    f = KINDS["conv2d"].branch(4, 4)
    chain = revcore.ReversibleSequential(
        revcore.ReversibleBlock(f, f), revcore.ReversibleBlock(f, KINDS["conv2d"].branch(4, 4))
    ).to(device, torch.float64)
    case = make_case("additive", "conv2d", 2, device)
    case.chain = chain
    twin = case.twin()
    ours = gradients(chain, chain, case.x)
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, case.x))


@pytest.mark.parametrize("when", ["in one forward", "in two forwards"])
def test_chain_used_twice_before_backward(when, device):
    case = make_case("additive", "conv2d", 2, device)
    twin = case.twin()
    other = torch.randn_like(case.x)

    def twice(function):
        if when == "in one forward":
            return lambda x: function(function(x))
        return lambda x: torch.cat((function(x), function(other)), 0)

    plain = gradients(twice(lambda x: case.plain(x, twin)), twin, case.x)
    assert_same(gradients(twice(case.chain), case.chain, case.x), plain)


def test_chain_inside_a_branch(device):
    def nested():
        inner = revcore.ReversibleSequential(*(revcore.ReversibleBlock(mlp()) for _ in range(2)))
        return nn.Sequential(nn.Linear(4, 4), inner)

    def mlp():
        return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), nn.Tanh())

    chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(nested()) for _ in range(2)))
    chain = chain.to(device, torch.float64)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)
    torch.manual_seed(1)
    ours = gradients(chain, chain, x)
    revcore.set_reversing(chain, False)
    torch.manual_seed(1)
    assert_same(ours, gradients(chain, chain, x))


def test_buffers_of_a_chain_inside_a_branch_change_once(device):
    norms = [nn.BatchNorm1d(2) for _ in range(2)]
    inner = revcore.ReversibleSequential(revcore.AdditiveCoupling(*norms))
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(inner)).to(device)
    chain(torch.randn(5, 8, device=device, requires_grad=True)).sum().backward()
    assert [norm.num_batches_tracked.item() for norm in norms] == [1, 1]


def test_nested_chains_are_one_chain(device):
    case = make_case("additive", "mlp", 4, device)
    nested = revcore.ReversibleSequential(case.chain[:2], case.chain[2:])
    twin = case.twin()
    plain = gradients(lambda x: case.plain(x, twin), twin, case.x)
    ours = gradients(nested, nested, case.x)
    assert torch.equal(ours["output"], plain["output"])
    torch.testing.assert_close(ours["input"], plain["input"])


@pytest.mark.parametrize("layout", ["view", "transposed", "channels_last", "expanded"])
def test_layouts_of_the_input(layout, device):
    case = make_case("additive", "conv2d", 2, device)
    x = {
        "view": torch.randn(3, 10, 5, 4, dtype=torch.float64, device=device)[:, 1:9],
        "transposed": torch.randn(3, 8, 4, 5, dtype=torch.float64, device=device).mT,
        "channels_last": case.x.contiguous(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 8, 1, 4, dtype=torch.float64, device=device).expand(3, 8, 5, 4),
    }[layout]
    twin = case.twin()
    y = case.chain(x)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
    ours = gradients(case.chain, case.chain, x)
    twin(x)  # the chain above has seen x twice, for its running statistics
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, x))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_and_batch_of_one(batch, device):
    case = make_case("additive", "mlp", 3, device)
    twin = case.twin()
    x = torch.randn(batch, 8, dtype=torch.float64, device=device)
    ours = gradients(case.chain, case.chain, x)
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, x))


class Fan(revcore.AdditiveCoupling):
    """Reads one stream of three, and changes the others."""

    streams = 3

    def half_steps(self):
        return [revcore.HalfStep(self, self.f, 1, 0), revcore.HalfStep(self, self.g, 2, 0)]


class Bias(nn.Module):
    """Does not depend on its input."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.bias.expand(x.shape)


class Turn(nn.Module):
    """Is invertible, and knows its log-determinant."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return x * self.log_scale.exp()

    def inverse(self, y):
        return y * (-self.log_scale).exp()

    def log_det(self, x):
        return self.log_scale * x[0].numel()


AFFINE = partial(revcore.ReversibleBlock, coupling="affine")
PARTLY = {
    "three streams": (lambda: [Fan(nn.Linear(4, 4), nn.Linear(4, 4))], {}, 3, 2),
    "an ignored input": (lambda: [revcore.ReversibleBlock(nn.Linear(4, 4), Bias())], {}, 2, 1),
    "affine, the first": (lambda: [AFFINE(nn.Linear(4, 4)), AFFINE(nn.Linear(4, 4))], {}, 2, 0),
    "the volume alone": (lambda: [AFFINE(nn.Linear(4, 4))] * 2, {"log_det": True}, 2, 2),
    "not the volume": (lambda: [AFFINE(nn.Linear(4, 4)), Turn()], {"log_det": True}, 2, 1),
    "the volume of a turn": (lambda: [Turn(), Turn()], {"log_det": True}, 2, 2),
    "grid": (
        lambda: [revcore.ReversibleBlock(nn.Linear(4, 4), Bias(), coupling="fixed_point")],
        {},
        2,
        1,
    ),
}


@pytest.mark.parametrize(("blocks", "options", "streams", "which"), PARTLY.values(), ids=PARTLY)
def test_what_a_loss_does_not_depend_on_gets_none(blocks, options, streams, which, device):
    torch.manual_seed(0)
    chain = revcore.ReversibleSequential(*blocks(), **options).double().to(device)
    x = torch.rand(6, 4 * streams, dtype=torch.float64, device=device).chunk(streams, 1)
    found, hooked = [], []
    for net in (chain, revcore.set_reversing(copy.deepcopy(chain), False)):
        calls = []
        for name, module in net.named_modules():
            if isinstance(module, (nn.Linear, Bias)):
                module.register_full_backward_hook(lambda *_, n=name, to=calls: to.append(n))
        leaves = [each.clone().requires_grad_() for each in x]
        net(*leaves)[which].square().sum().backward()
        found.append([*(leaf.grad for leaf in leaves), *(p.grad for p in net.parameters())])
        hooked.append(sorted(calls))
    assert options or None in found[1]
    assert hooked[0] == hooked[1]
    torch.testing.assert_close(*found)
