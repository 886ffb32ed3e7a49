"""The fixed-point coupling: the same bits back, the same bits as stored, and no silent overflow."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import loss_of, make_case, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revcore

BITS = 16


def on_grid(x, bits=BITS):
    return torch.round(x * 2.0**bits) / 2.0**bits


def make_chain(branch, depth, fraction_bits=BITS):
    couplings = (
        revcore.FixedPointCoupling(branch(), branch(), fraction_bits=fraction_bits)
        for _ in range(depth)
    )
    return revcore.ReversibleSequential(*couplings)


def same_bits(a, b):
    """Also tells 0.0 from -0.0."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


class LowPrecision(nn.Module):
    """A branch whose arithmetic is as coarse as it gets."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x):
        return 5 * torch.tanh(self.linear(x.bfloat16()))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 18)),
    scale=st.floats(1e-6, 3.0),
    seed=st.integers(0, 2**31),
    low=st.booleans(),
)
def test_inverse_gives_the_same_bits(size, scale, seed, low, device):
    depth, bits = size
    torch.manual_seed(seed)
    chain = make_chain(LowPrecision if low else lambda: mlp(4, 4), depth, bits)
    chain.to(device)
    x = on_grid(scale * torch.randn(5, 8, device=device), bits) + 0.0
    with torch.no_grad():
        y = chain(x)
        assert torch.equal(y, on_grid(y, bits))
        assert torch.equal(chain.inverse(y), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_input_is_rounded_to_the_grid_in_both_modes(dtype, device):
    chain = make_chain(lambda: mlp(4, 4), 2).to(device, dtype)
    x = torch.randn(5, 8, device=device, dtype=dtype)
    assert not torch.equal(x, on_grid(x))
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing)
        assert same_bits(chain(x).detach(), chain(on_grid(x)).detach())
        assert torch.equal(chain.inverse(chain(x)), on_grid(x))


def conv_net(device):
    def branch():
        return nn.Sequential(
            nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.1)
        )

    torch.manual_seed(0)
    chain = make_chain(branch, 4)
    return nn.Sequential(nn.Conv2d(3, 8, 3), chain, nn.Flatten(), nn.Linear(8 * 16, 5)).to(device)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 branches"])
def test_training_ends_with_the_same_bits_as_stored(autocast, device):
    class Float(nn.Module):
        def forward(self, x):
            return x.float()

    nets = [conv_net(device) for _ in range(2)]
    for net in nets:
        net.insert(1, Float())
    revcore.set_reversing(nets[1], False)
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(200):
            x = torch.randn(4, 3, 6, 6, device=device)
            labels = x[:, 0, 0].argmax(1) % 5
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ours, stored = (net.state_dict() for net in nets)
    for name, value in stored.items():
        assert torch.equal(ours[name], value), name
    fresh = conv_net(device).state_dict()
    assert not torch.equal(fresh["1.0.f.2.weight"], ours["2.0.f.2.weight"])


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_with_gaps_have_the_same_bits_as_stored(apart, device):
    chain = make_chain(lambda: nn.BatchNorm2d(4), 2).to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(4, 8, 8, 8, device=device)
    found = []
    for net in (chain, twin):
        leaf = x.clone().requires_grad_()
        y = torch.cat(net(*leaf.chunk(2, 1)), 1) if apart else net(leaf)
        y.square().mean().backward()
        found.append([leaf.grad, *(p.grad for p in net.parameters())])
    assert all(map(torch.equal, *found))


class Mixer(nn.Module):
    """Mixes tokens, in a memory layout of its own."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(5, 5)

    def forward(self, x):
        return self.mix(x.mT).mT.tanh()


@pytest.mark.parametrize("reduce", [torch.sum, partial(torch.sum, dim=1), lambda y: y.sum(-1) ** 2])
@pytest.mark.parametrize("depth", [1, 4])
def test_gradients_of_one_number_for_many_have_the_same_bits_as_stored(depth, reduce, device):
    for seed in range(4):
        torch.manual_seed(seed)
        blocks = [
            revcore.ReversibleBlock(Mixer(), Mixer(), coupling="fixed_point") for _ in range(depth)
        ]
        chain = revcore.ReversibleSequential(*blocks, split_dim=-1).to(device)
        x, found = torch.randn(4, 5, 16, device=device), []
        for reversing in (True, False):
            revcore.set_reversing(chain, reversing).zero_grad()
            reduce(chain(x)).square().sum().backward()
            found.append([parameter.grad for parameter in chain.parameters()])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("streams", [(0,), (1,), (0, 1)])
def test_a_loss_of_streams_inside_has_the_same_bits_as_stored(streams, device):
    chain = make_case("fixed-point", "mlp", 4, device, torch.float32).chain
    taken = []
    chain[1].register_forward_hook(lambda _module, _x, y: taken.extend(y[i] for i in streams))
    x, found = torch.randn(5, 8, device=device), []
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing).zero_grad()
        taken.clear()
        loss = loss_of(chain(x)) + sum(loss_of(3 * stream) for stream in taken)
        loss.backward()
        found.append([parameter.grad for parameter in chain.parameters()])
    assert all(map(torch.equal, *found))


def image(*shape, layout):
    x = torch.randn(shape)
    return (
        x.transpose(1, 3).contiguous().transpose(1, 3)
        if layout == "transposed"
        else x.to(memory_format=layout)
    )


@pytest.mark.parametrize("scheme", ["additive", "fixed_point"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "transposed"])
@pytest.mark.parametrize("shape", [(1, 8, 6, 5), (1, 2, 5, 5), (3, 8, 1, 5), (2, 2, 6, 1)])
def test_dimensions_of_size_1_have_the_same_bits_as_stored(shape, layout, scheme, device):
    """Of these torch gives strides at will, by which kernels go."""
    width = shape[1] // 2

    def branch():
        convolutions = nn.Conv2d(width, 6, 3, padding=1), nn.Conv2d(6, width, 1)
        return nn.Sequential(convolutions[0], nn.Tanh(), convolutions[1])

    blocks = [revcore.ReversibleBlock(branch(), branch(), scheme) for _ in range(3)]
    chain, found = revcore.ReversibleSequential(*blocks).to(device), []
    x = image(*shape, layout=layout).to(device)
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing).zero_grad()
        y = chain(x)
        y.square().sum().backward()
        with torch.no_grad():
            assert torch.equal(chain(x), y)
        found.append([y.detach(), *(p.grad for p in chain.parameters())])
    same = found if scheme == "fixed_point" else [each[:1] for each in found]
    assert all(map(torch.equal, *same))


class Signs(nn.Linear):
    def forward(self, x):
        return super().forward(torch.where(torch.signbit(x), 0.1 * x, x))


@pytest.mark.parametrize("bits", [4, 16])
def test_zeros_come_back_with_their_sign(bits, device):
    torch.manual_seed(0)
    coupling = partial(revcore.FixedPointCoupling, fraction_bits=bits)
    blocks = [revcore.ReversibleBlock(Signs(4, 4), coupling=coupling) for _ in range(3)]
    chain, found = revcore.ReversibleSequential(*blocks).to(device), []
    x = torch.full((6, 8), -1e-6, device=device, requires_grad=True)
    for reversing in (True, False):
        y = revcore.set_reversing(chain, reversing)(x)
        found.append(torch.autograd.grad(y.square().sum(), [x, *chain.parameters()]))
    assert all(map(torch.equal, *found))


class Readers(revcore.FixedPointCoupling):
    """Reads a stream twice that it leaves as it is."""

    streams = 3

    def half_steps(self):
        pairs = ((self.f, 0), (self.g, 1))
        return [revcore.HalfStep(self, branch, target, source=2) for branch, target in pairs]


def test_streams_that_are_read_alone_have_the_same_bits_as_stored(device):
    for _ in range(5):
        blocks = [Readers(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
        chain = revcore.ReversibleSequential(*blocks).to(device)
        x, found = torch.randn(7, 12, device=device, requires_grad=True), []
        for reversing in (True, False):
            revcore.set_reversing(chain, reversing)
            loss = chain(x).sin().square().sum()
            found.append(torch.autograd.grad(loss, [x, *chain.parameters()]))
        assert all(map(torch.equal, *found))


def test_gradients_are_those_of_the_additive_coupling(device):
    """Where rounding changes nothing: on inputs and branch outputs that are on the grid."""
    f, g = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    for branch in (f, g):
        branch.weight.data.copy_(torch.randint(-3, 3, (4, 4)))
    fixed = revcore.ReversibleBlock(f, g, "fixed_point").to(device)
    additive = copy.deepcopy(revcore.ReversibleBlock(f, g)).to(device)
    x = torch.randint(-9, 9, (5, 8), device=device).float().requires_grad_()
    fixed(x).square().sum().backward()
    grad, x.grad = x.grad, None
    additive(x).square().sum().backward()
    assert torch.equal(grad, x.grad)
    for a, b in zip(fixed.parameters(), additive.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("around_backward", [False, True])
def test_hooks_on_saved_tensors_keep_nothing_alive(around_backward, device):
    packed = []

    def pack(x):
        packed.append(weakref.ref(x))
        return x

    chain = make_case("fixed-point", "mlp", device=device, dtype=torch.float32).chain
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks:
        loss = loss_of(chain(torch.randn(5, 8, device=device)))
        if around_backward:
            loss.backward()
    if not around_backward:
        loss.backward()
    del loss
    gc.collect()
    alive = [x() for x in packed if x() is not None]
    assert packed
    assert all(any(x is p for p in chain.parameters()) for x in alive)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.aux, self.table = nn.Linear(4, 4), None, {}

    def forward(self, x):
        x = self.linear(x).tanh()
        self.aux = self.table["aux"] = x.square().mean()
        return x


@pytest.mark.parametrize("scheme", ["additive", "fixed_point"])
def test_a_result_in_an_attribute_has_no_graph_of_the_first_run(scheme, device):
    block = revcore.ReversibleBlock(Auxiliary(), coupling=scheme)
    chain = revcore.ReversibleSequential(block).to(device)
    chain(torch.randn(5, 8, device=device, requires_grad=True))
    f = block.coupling.f
    assert not f.aux.requires_grad
    assert not f.table["aux"].requires_grad
    assert f.aux > 0


@pytest.mark.parametrize("reversing", [True, False])
@pytest.mark.parametrize("cause", ["input", "branch", "not finite"])
def test_overflow_is_an_error(reversing, cause, device):
    chain = make_chain(lambda: nn.Linear(4, 4), 3).to(device)
    revcore.set_reversing(chain, reversing)
    x = torch.ones(2, 8, device=device)
    if cause == "input":
        x[1, 3] = 300.0
    else:
        chain[1].g.bias.data[2] = 300.0 if cause == "branch" else float("nan")
    with pytest.raises(OverflowError, match=r"reached (\d{3}\S*|nan), .*must stay below 256"):
        chain(x)
    # Halved in the next step, an overflow is still one.
    if cause == "branch":
        chain[2].g.bias.data[2] = -300.0
        with pytest.raises(OverflowError):
            chain(x)


def test_an_input_may_be_too_large_if_the_sum_fits(device):
    chain = make_chain(lambda: nn.Linear(4, 4), 1).to(device)
    nn.init.constant_(chain[0].f.bias, -100.0 - 2.0**-16)
    stored = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(2, 8, device=device)
    x[1, 3] = 300.0
    for net in (chain, stored):
        net(x).square().sum().backward()
    for ours, theirs in zip(chain.parameters(), stored.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    with pytest.raises(OverflowError, match="reached 300"):
        chain.inverse(chain(x))


def test_dtypes_without_a_grid_are_refused():
    chain = make_chain(lambda: nn.Linear(4, 4), 1)
    with pytest.raises(TypeError, match=r"all float64, got torch.bfloat16: call x.float()"):
        chain(torch.randn(2, 8, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"all float32 or all float64, got torch\.float64"):
        chain(torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4))


def test_fraction_bits_that_are_set_later():
    coupling = revcore.FixedPointCoupling(nn.Identity(), nn.Identity())
    coupling.fraction_bits = 22
    with pytest.raises(OverflowError, match=r"fraction_bits=22.*must stay below 4\."):
        coupling(torch.full((2, 8), 3.0))


@pytest.mark.parametrize("bits", [0, 53, -1, 16.5])
def test_fraction_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="fraction_bits"):
        revcore.FixedPointCoupling(nn.Identity(), nn.Identity(), fraction_bits=bits)


@pytest.mark.parametrize("reversing", [True, False])
def test_one_chain_has_one_grid(reversing):
    def block(coupling):
        return revcore.ReversibleBlock(nn.Linear(4, 4), coupling=coupling)

    def fine(f, g, split_dim=1):
        return revcore.FixedPointCoupling(f, g, split_dim, fraction_bits=18)

    for couplings in (
        ["fixed_point", "additive"],
        ["affine", "fixed_point"],
        ["fixed_point", fine],
    ):
        chain = revcore.ReversibleSequential(*map(block, couplings))
        revcore.set_reversing(chain, reversing)
        with pytest.raises(ValueError, match="mixes fixed-point couplings"):
            chain(torch.randn(2, 8))


def test_branches_run_the_same_graph_both_times(device):
    """With and without gradients, compiled code may compute other bits."""

    class OtherBitsWithoutGradients(nn.Linear):
        def forward(self, x):
            return super().forward(x) + (0 if torch.is_grad_enabled() and x.requires_grad else 1e-3)

    chain = make_chain(lambda: OtherBitsWithoutGradients(4, 4), 3).to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    results = []
    for module in (chain, twin):
        x = torch.linspace(-1, 1, 48, device=device).view(6, 8).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for ours, stored in zip(*results, strict=True):
        assert torch.equal(ours, stored)


class Twice(nn.Module):
    """Uses its weight twice, so that autocast may cast it once or twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.linear(x).tanh())


def test_a_weight_that_is_cast_twice_has_the_same_bits_as_stored(device):
    torch.manual_seed(0)
    blocks = (revcore.ReversibleBlock(Twice(), coupling="fixed_point") for _ in range(3))
    chain = revcore.ReversibleSequential(*blocks).to(device)
    x = torch.randn(16, 8, device=device)
    found = []
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing).zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            chain(x).square().sum().backward()
        found.append([p.grad.clone() for p in chain.parameters()])
    assert all(map(torch.equal, *found))


class Conditioned(nn.Module):
    """Reads a condition twice, as a feature-wise affine transformation does."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale, self.shift = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x, condition):
        return torch.tanh(self.linear(x)) * self.scale(condition) + self.shift(condition)


def with_a_condition(net, x):
    embedded = net.embedding(x[:, :5])
    return net.chain(x, condition=embedded).square().mean()


def test_uses_of_an_argument_in_one_branch_add_up_as_in_the_stored_chain(device):
    torch.manual_seed(0)
    net = nn.Module()
    net.embedding, net.chain = nn.Linear(5, 3), make_chain(Conditioned, 3)
    net.to(device)
    twin = revcore.set_reversing(copy.deepcopy(net), False)
    for one in (net, twin):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            with_a_condition(one, torch.randn(7, 8, device=device)).backward()
            optimizer.step()
    assert all(map(same_bits, net.state_dict().values(), twin.state_dict().values()))


class Looked(nn.Module):
    def forward(self, x, table):
        return x * F.embedding(torch.arange(5), table, sparse=True)


def test_an_argument_that_gets_a_sparse_gradient():
    chain, table = make_chain(Looked, 2), torch.randn(7, 4, requires_grad=True)
    x, found = torch.randn(5, 8), []
    for reversing in (True, False):
        y = revcore.set_reversing(chain, reversing)(x, table=table)
        found += torch.autograd.grad(y.square().sum(), table)
    assert torch.equal(found[0].to_dense(), found[1].to_dense())


class Same(nn.Module):
    """Asks whether two arguments are one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, k, v):
        return self.linear(x) * (k if k is v else k + v)


def test_a_tensor_that_is_two_arguments_is_one_where_activations_are_stored():
    torch.manual_seed(0)
    chain, memory = make_chain(Same, 2), torch.randn(5, 4, requires_grad=True)
    x, found = torch.randn(5, 8), []
    for reversing in (True, False):
        y = revcore.set_reversing(chain, reversing)(x, k=memory, v=memory)
        found.append(y)
    assert torch.equal(*found)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, graph):
        return torch.sparse.mm(graph, self.linear(x)).tanh()


def test_a_sparse_argument_has_the_same_gradient_as_stored():
    torch.manual_seed(0)
    chain = make_chain(Sparse, 2)
    graph = torch.eye(5).roll(1, 0).to_sparse_coo().requires_grad_()
    x, found = torch.randn(5, 8), []
    for reversing in (True, False):
        y = revcore.set_reversing(chain, reversing)(x, graph=graph)
        found.append(torch.autograd.grad(y.square().sum(), [graph, *chain.parameters()]))
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(*found, strict=True))


class Outside(nn.Module):
    """Depends on something that no chain can know of."""

    scale = (1.0,)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * self.scale[0]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_other_bits_in_the_second_run_are_an_error(direction, device, monkeypatch):
    chain = make_chain(Outside, 2).to(device)
    for frozen in (False, True):
        chain[0].requires_grad_(not frozen)
        x = torch.randn(5, 8, device=device, requires_grad=not frozen)
        run = chain if direction == "forward" else chain.inverse
        run(x).sum().backward()
        y = run(x)
        monkeypatch.setattr(Outside, "scale", (1.0 + 1e-3,))
        with pytest.raises(RuntimeError, match="was not reconstructed bit for bit"):
            y.sum().backward()
        monkeypatch.undo()
