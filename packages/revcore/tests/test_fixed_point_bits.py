"""A fixed-point chain that is trained reversed has the bits of one that stores its activations."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import fixed_point_chain, loss_of, make_case, same_bits
from torch import nn

import revcore


def conv_net(device):
    def branch():
        return nn.Sequential(
            nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.1)
        )

    torch.manual_seed(0)
    chain = fixed_point_chain(branch, 4)
    return nn.Sequential(nn.Conv2d(3, 8, 3), chain, nn.Flatten(), nn.Linear(8 * 16, 5)).to(device)


def with_a_condition(net, x):
    embedded = net.embedding(x[:, :5])
    return net.chain(x, condition=embedded).square().mean()


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
    chain = fixed_point_chain(lambda: nn.BatchNorm2d(4), 2).to(device)
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
    if layout == "transposed":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    return x.to(memory_format=layout)


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


def test_uses_of_an_argument_in_one_branch_add_up_as_in_the_stored_chain(device):
    torch.manual_seed(0)
    net = nn.Module()
    net.embedding, net.chain = nn.Linear(5, 3), fixed_point_chain(Conditioned, 3)
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
    chain, table = fixed_point_chain(Looked, 2), torch.randn(7, 4, requires_grad=True)
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
    chain, memory = fixed_point_chain(Same, 2), torch.randn(5, 4, requires_grad=True)
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
    chain = fixed_point_chain(Sparse, 2)
    graph = torch.eye(5).roll(1, 0).to_sparse_coo().requires_grad_()
    x, found = torch.randn(5, 8), []
    for reversing in (True, False):
        y = revcore.set_reversing(chain, reversing)(x, graph=graph)
        found.append(torch.autograd.grad(y.square().sum(), [graph, *chain.parameters()]))
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(*found, strict=True))
