"""The whole chain under torch.compile(fullgraph=True): right, in constant memory, or refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import SCHEMES, Mixing, assert_same, compiled, gradients, make_case, mlp, traceable
from torch import nn

import revcore

pytestmark = [traceable, pytest.mark.usefixtures("fresh_compiler")]


def assert_as_plain(case, x=None, tolerance=1e-9):
    twin = case.twin()
    x = case.x if x is None else x
    ours = gradients(compiled(case.chain), case.chain, x)
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, x), tolerance)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        *((scheme, "conv2d") for scheme in SCHEMES if scheme != "fixed-point"),
        *(("additive", kind) for kind in ("mlp", "conv1d", "transformer")),
    ],
)
def test_gradients_are_those_of_plain_autograd(scheme, kind, device):
    assert_as_plain(make_case(scheme, kind, device=device))


def test_evaluation_mode_and_kept_inputs(device):
    case = make_case("affine-exp", "conv2d", device=device)
    case.chain.eval()
    case.chain[1].keep_input = True
    assert_as_plain(case)


@pytest.mark.parametrize("frozen", ["0.coupling.f", "0", "2"])
def test_frozen_parts(frozen):
    case = make_case("additive", "mlp")
    case.chain.get_submodule(frozen).requires_grad_(False)
    assert_as_plain(case)


def test_parametrized_branches():
    case = make_case("additive", "mlp")
    for block in case.chain:
        nn.utils.parametrizations.weight_norm(block.coupling.f[0])
    assert_as_plain(case)


def under_autocast(function):
    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(x).float()

    return run


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scheme", [revcore.AdditiveCoupling, Mixing])
def test_autocast(scheme, inside):
    branches = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6))
    chain = revcore.ReversibleSequential(*map(scheme, branches, branches))
    twin, x = revcore.set_reversing(copy.deepcopy(chain), False), torch.randn(6, 8)
    run = compiled(under_autocast(chain)) if inside else under_autocast(compiled(chain))
    ours = gradients(run, chain, x)
    stored = gradients(under_autocast(twin), twin, x)
    for name, expected in stored.items():
        assert (ours[name] - expected).norm() <= 0.02 * expected.norm(), name


class Own(nn.Module):
    """Is tried before it is compiled, because nothing is known of its class."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


@pytest.mark.parametrize("inside", [True, False])
def test_streams_in_the_precision_of_autocast(inside):
    chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(Own()) for _ in range(3)))
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(2, 8, 5, dtype=torch.bfloat16)
    run = compiled(under_autocast(chain)) if inside else under_autocast(compiled(chain))
    ours, stored = gradients(run, chain, x), gradients(under_autocast(twin), twin, x)
    for name, expected in stored.items():
        assert (ours[name] - expected).norm() <= 0.05 * expected.norm(), name


class Scaled(nn.Linear):
    def forward(self, x, scale, times=1):
        return torch.tanh(super().forward(x)) * scale * times


def test_arguments_get_their_gradients():
    chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(Scaled(4, 4)) for _ in range(3)))
    results = []
    for run in (compiled(chain), revcore.set_reversing(copy.deepcopy(chain), False)):
        torch.manual_seed(0)
        x = torch.randn(3, 8, requires_grad=True)
        scale = torch.rand(4, requires_grad=True)
        run(x, scale=scale, times=2).sin().sum().backward()
        results.append({"x": x.grad, "scale": scale.grad})
    assert_same(*results, tolerance=1e-5)


def test_inverse_and_invertible_modules():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x):
            return x * self.factor

        def inverse(self, y):
            return y / self.factor

    blocks = [revcore.ReversibleBlock(nn.Linear(4, 4)), revcore.ReversibleBlock(nn.Linear(4, 4))]
    chain = revcore.ReversibleSequential(blocks[0], Double(), blocks[1]).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    assert_same(gradients(compiled(chain), chain, x), gradients(twin, twin, x))
    assert_same(gradients(compiled(chain.inverse), chain, x), gradients(twin.inverse, twin, x))


def kept_bytes(depth):
    torch.compiler.reset()
    branches = [
        nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        for _ in range(2 * depth)
    ]
    chain = revcore.ReversibleSequential(
        *(revcore.ReversibleBlock(*branches[2 * i : 2 * i + 2]) for i in range(depth))
    )
    batch = 1000
    y = compiled(chain)(torch.randn(batch, 16, requires_grad=True))
    return sum(t.nbytes for t in y.grad_fn.saved_tensors if t.dim() and len(t) == batch)


def test_what_is_kept_does_not_grow_with_depth():
    shallow, deep = kept_bytes(2), kept_bytes(6)
    assert 0 < deep <= shallow


class Unknown(nn.Module):
    """Of a class of which revcore does not know that it draws nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).tanh()


def test_batches_of_several_sizes():
    torch.compiler.reset()
    couplings = [revcore.AdditiveCoupling(Unknown(), Unknown()) for _ in range(2)]
    chain = revcore.ReversibleSequential(*couplings, split_dim=-1)
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    for batch in (5, 7, 9):
        x = torch.randn(batch, 8, requires_grad=True)
        (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(chain(x).square().sum(), x)
        torch.testing.assert_close(ours, theirs)


def test_fixed_point_without_reversing(device):
    # Float32 streams: float64 ones have so many digits that nothing overflows.
    blocks = (revcore.ReversibleBlock(mlp(4, 4), coupling="fixed_point") for _ in range(3))
    chain = revcore.ReversibleSequential(*blocks).to(device)
    stored = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(3, 8, device=device)
    assert_same(gradients(compiled(stored), stored, x), gradients(chain, chain, x), 1e-5)
    with torch.no_grad():
        y = compiled(chain)(x)
        assert torch.equal(y, chain(x))
        assert torch.equal(compiled(chain.inverse)(y), torch.round(x * 2.0**16) / 2.0**16)
        assert compiled(chain)(1e6 * x).isnan().all()


class Flip(nn.Module):
    coupling = "none"  # an attribute of this name need not be a coupling

    def forward(self, x):
        return x.flip(1)

    inverse = forward


def test_any_module_with_an_inverse(device):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(4, 4)), Flip())
    chain.to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(6, 8, device=device)
    assert_same(gradients(compiled(chain), chain, x), gradients(twin, twin, x), 1e-5)


class Transposed(nn.Module):
    """Gives a tensor whose dimensions lie in another order."""

    def forward(self, x):
        return x.t().flip(0).t()

    inverse = forward

    def log_det(self, x):
        return x.new_zeros(len(x))


@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize("reversing", [False, True])
def test_invertible_modules_alone(reversing, log_det, device):
    chain = revcore.ReversibleSequential(Transposed(), Transposed(), log_det=log_det).to(device)
    revcore.set_reversing(chain, reversing)
    x = torch.randn(6, 8, device=device)
    torch.testing.assert_close(compiled(chain)(x), chain(x))
    torch.testing.assert_close(compiled(chain.inverse)(x), chain.inverse(x))


class Masked(nn.Module):
    """Gets a mask, and a condition that takes a gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask, scale):
        return self.linear(x).masked_fill(mask, 0.0) * scale


def shared_blocks():
    return (revcore.ReversibleBlock(nn.Linear(4, 4)),) * 2


def shared_branches():
    linear = nn.Linear(4, 4)
    return (revcore.ReversibleBlock(linear, linear),)


def tied_weights():
    one, two = (revcore.ReversibleBlock(nn.Linear(4, 4)) for _ in range(2))
    two.coupling.f.weight = one.coupling.f.weight
    return one, two


@pytest.mark.parametrize("blocks", [shared_blocks, shared_branches, tied_weights])
def test_a_tensor_that_comes_twice(blocks):
    chain = revcore.ReversibleSequential(*blocks()).double()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(3, 4, dtype=torch.float64)
    ours = gradients(compiled(lambda x: torch.cat(chain(x.sin(), x.sin()))), chain, x)
    assert_same(ours, gradients(lambda x: torch.cat(twin(x.sin(), x.sin())), twin, x))

    def doubled(net):
        def call(x):
            h = x.sin()
            return torch.cat(net(h, h))

        return call

    torch.compiler.reset()
    ours = gradients(compiled(doubled(chain)), chain, x)
    assert_same(ours, gradients(doubled(twin), twin, x))


def test_masks_and_an_argument_that_is_a_stream():
    chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(Masked()) for _ in range(2)))
    chain.double()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    mask = torch.tensor([True, False, False, True])

    def call(net):
        return lambda x: torch.cat(net(x, 2 * x, mask=mask, scale=x))

    x = torch.randn(3, 4, dtype=torch.float64)
    assert_same(gradients(compiled(call(chain)), chain, x), gradients(call(twin), twin, x))


def test_transforms_inside_of_what_is_compiled_run_stored():
    case = make_case("additive", "mlp")
    plain = torch.func.jvp(case.plain, (case.x,), (case.x,))
    found = compiled(lambda x: torch.func.jvp(case.chain, (x,), (x,)))(case.x)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_is_stored(strict):
    case = make_case("additive", "mlp")
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(
        case.chain.eval(), (case.x,), dynamic_shapes={"x": sizes}, strict=strict
    )
    x = case.x[:3]
    torch.testing.assert_close(exported.module()(x), case.plain(x))


@pytest.mark.parametrize("keep_input", [False, True])
def test_log_determinants_beside_kept_inputs_and_buffers(keep_input, device):
    def coupling(f, g, split_dim):
        adapter = revcore.bounded_adapter
        return revcore.AffineCoupling(f, g, adapter=adapter, split_dim=split_dim)

    def branch():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    blocks = (revcore.ReversibleBlock(branch(), branch(), coupling) for _ in range(3))
    net = revcore.ReversibleSequential(*blocks, log_det=True).to(device, torch.float64).eval()
    for block in net:
        block.keep_input = keep_input
    x = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for run in (torch.compile(net, fullgraph=True, backend="aot_eager"), net):
        revcore.set_reversing(net, run is not net)
        z, log_det = run(x)
        loss = z.sin().sum() + log_det.cos().sum()
        found.append(torch.autograd.grad(loss, [x, *net.parameters()]))
    torch.testing.assert_close(*found)


class Conditioned(nn.Module):
    """A flow's step that both ways need the condition for."""

    def forward(self, x, *, t=None):
        return x if t is None else x * (1 + t.exp())

    def inverse(self, y, *, t=None):
        return y if t is None else y / (1 + t.exp())


@pytest.mark.parametrize("fullgraph", [True, False])
def test_an_inverse_gets_the_arguments(fullgraph, device):
    torch.manual_seed(0)

    class Branch(nn.Linear):
        def forward(self, x, *, t=None):
            return super().forward(x) if t is None else super().forward(x) * t[:, :4]

    blocks = (revcore.ReversibleBlock(Branch(4, 4), Branch(4, 4)) for _ in range(2))
    one, two = blocks
    chain = revcore.ReversibleSequential(one, Conditioned(), two).to(device, torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.randn(5, 8, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for net in (chain, torch.compile(chain, backend="aot_eager", fullgraph=fullgraph)):
        leaves = [x, t, *chain.parameters()]
        found.append(list(torch.autograd.grad(net(x, t=t).square().sum(), leaves)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch 2.11 does not see it as a constant")
def test_a_number_that_changes_compiled(device):
    class Powers(nn.Linear):
        def forward(self, x, *, k, scale):
            return super().forward(x).tanh() ** k * scale

    torch.manual_seed(0)
    block = revcore.ReversibleBlock(Powers(4, 4), Powers(4, 4)).to(device, torch.float64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    for k, scale in ((2, 0.5), (3, 0.25), (4, 0.125)):
        found = [
            list(torch.autograd.grad(net(x, k=k, scale=scale).sum(), list(block.parameters())))
            for net in (block, compiled)
        ]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_branches_of_torchs_modules_have_one_graph_for_all_sizes(device):
    torch.manual_seed(0)
    block = revcore.ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for size in range(2, 14):  # more than torch compiles
        compiled(torch.randn(size, 8, device=device)).sum().backward()


class InPlace(nn.Module):
    """Changes what a chain gives, or what it was given, in the same compiled code."""

    def __init__(self, how):
        super().__init__()
        blocks = (revcore.ReversibleBlock(mlp(4, 4)) for _ in range(3))
        self.chain, self.how, self.copies = revcore.ReversibleSequential(*blocks), how, False

    def forward(self, x):
        if self.how == "one tensor":
            return self.chain(x).mul_(2)
        if self.how == "inverse":
            a, b = self.chain.inverse(*x.chunk(2, 1))
        else:
            a, b = self.chain(*x.chunk(2, 1))
        if self.copies:
            a, b = a.clone(), b.clone()
        return torch.cat((a.mul_(2), F.relu(b, inplace=True)), 1)


@pytest.mark.parametrize("how", ["one tensor", "streams", "inverse"])
def test_changes_in_place_of_what_a_chain_gives(how, device):
    net = InPlace(how).double().to(device)
    twin = revcore.set_reversing(copy.deepcopy(net), False)
    twin.copies = True
    x = torch.randn(6, 8, dtype=torch.float64, device=device)
    assert_same(gradients(compiled(net), net, x), gradients(twin, twin, x))


class Leveled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.levels = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)

    def forward(self, x, *, function):
        return self.linear(x).tanh() * function * self.levels


def test_an_argument_that_changes_after_the_call(device):
    """Also: its name is one that the engine uses, and a parameter is an integer."""
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Leveled())).double().to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    scale = torch.rand(6, 4, dtype=torch.float64, device=device)

    def run(net):
        def forward(x):
            own = scale.clone()
            y = net(x, function=own)
            if net is chain:
                own *= 2
            return y

        return forward

    x = torch.randn(6, 8, dtype=torch.float64, device=device)
    assert_same(gradients(compiled(run(chain)), chain, x), gradients(run(twin), twin, x))


class Doubled(nn.Linear):
    def forward(self, x, times=1):
        return super().forward(x) * times


class Doubling(revcore.ReversibleBlock):
    """Gives its branches an argument of its own."""

    def forward(self, *x):
        return super().forward(*x, times=2)

    def inverse(self, *y):
        return super().inverse(*y, times=2)


def test_blocks_with_a_forward_of_their_own_where_nothing_is_reversed(device):
    blocks = (Doubling(Doubled(4, 4)), revcore.ReversibleBlock(nn.Linear(4, 4)))
    chain = revcore.ReversibleSequential(*blocks).double().to(device)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)
    y = chain(x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(chain)(x), y)
        torch.testing.assert_close(compiled(chain.inverse)(y), x)
        torch.testing.assert_close(torch.export.export(chain, (x,)).module()(x), y)
    revcore.set_reversing(chain, False)
    torch.compiler.reset()
    torch.testing.assert_close(compiled(chain)(x), y)


class Indexed(nn.Module):
    """Reads tables by integers, as attention with relative positions does, and graph networks."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(9, 4))
        self.register_buffer("index", torch.tensor([0, 3, 5, 5, 8]))

    def forward(self, x, edges, kind, transposed):
        h = self.linear(x) + self.table[self.index]
        h = h + torch.zeros_like(x).index_add(0, edges[1], h[edges[0]])
        return h + self.table[kind] + transposed.T.view(-1)


class Act(nn.BatchNorm1d):
    """A norm of one's own, with its activation."""

    def forward(self, x, **_):
        return super().forward(x).relu()


def test_indices_and_layouts_of_arguments_and_norms_of_ones_own():
    blocks = [revcore.ReversibleBlock(Indexed(), Act(4))]
    chain = revcore.ReversibleSequential(*blocks).double()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    given = {
        "edges": torch.tensor([[0, 1, 2, 4], [1, 0, 3, 2]]),
        "kind": torch.tensor([1, 3, 2, 0, 1]),
        "transposed": torch.randn(2, 2, dtype=torch.float64).T,
    }
    x = torch.randn(5, 8, dtype=torch.float64)
    ours = gradients(lambda x: compiled(chain)(x, **given), chain, x)
    assert_same(ours, gradients(lambda x: twin(x, **given), twin, x))
    assert_same(chain.state_dict(), twin.state_dict())
