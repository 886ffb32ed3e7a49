"""MemCNN's names: its two README examples, its state dicts, and what users build with them."""

import copy
import inspect

import pytest
import torch
from cases import assert_same, gradients
from torch import nn

import revcore
import revcore.memcnn as memcnn  # noqa: PLR0402 - as users write it
from revcore.streams import as_streams


class ExampleOperation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Conv2d(channels, channels, (3, 3), padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.seq(x)


def test_example_of_the_first_releases():
    x = torch.rand(2, 10, 8, 8)
    block = memcnn.ReversibleBlock(
        ExampleOperation(channels=10 // 2),
        coupling="additive",
        keep_input=True,
        keep_input_inverse=True,
    )
    block.eval()
    y = block(x)
    assert y.shape == x.shape
    assert torch.allclose(x, block.inverse(y), atol=1e-06)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_wrapper_of_any_module_in_a_chain(keep, apart):
    blocks = [
        memcnn.InvertibleModuleWrapper(Scale().double(), keep_input=keep),
        memcnn.ReversibleBlock(nn.Linear(4, 4).double()),
        memcnn.InvertibleModuleWrapper(Scale().double(), keep_input_inverse=keep),
    ]
    chain = revcore.ReversibleSequential(*blocks)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    inputs = x.chunk(2, 1) if apart else (x,)
    y = chain(*inputs)
    torch.testing.assert_close(torch.cat(as_streams(y), 1), nn.Sequential(*blocks)(x))
    back = chain.inverse(*as_streams(y))
    torch.testing.assert_close(torch.cat(as_streams(back), 1), x)
    plain = copy.deepcopy(chain)
    revcore.set_reversing(plain, enabled=False)
    for net in (chain, plain):
        sum(out.sin().sum() for out in as_streams(net(*inputs))).backward()
    for ours, theirs in zip(chain.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class Mixed(nn.Module):
    """Looks at the last dimension alone, and takes streams of any number of them."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8).double())

    def forward(self, x):
        return x @ self.matrix

    def inverse(self, y):
        return torch.linalg.solve(self.matrix.T, y.transpose(-1, -2)).transpose(-1, -2)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_the_streams_are_those_of_the_outer_chain(inner, hooked):
    torch.manual_seed(0)
    mixed = Mixed()
    part = revcore.ReversibleSequential(mixed) if inner else memcnn.InvertibleModuleWrapper(mixed)
    if hooked:
        part.register_forward_hook(lambda *_: None)
    block = revcore.ReversibleBlock(nn.Linear(4, 4).double())
    chain = revcore.ReversibleSequential(block, part, split_dim=-1)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    half = revcore.ReversibleSequential(block, split_dim=-1)(x)
    torch.testing.assert_close(chain(x), mixed(half))
    torch.testing.assert_close(chain.inverse(chain(x)), x)


def test_a_wrapper_of_a_block_in_a_chain():
    inner = revcore.ReversibleBlock(nn.Linear(4, 4))
    chain = revcore.ReversibleSequential(memcnn.InvertibleModuleWrapper(inner, keep_input=True))
    assert torch.equal(chain(torch.ones(2, 8)), inner(torch.ones(2, 8)))
    with revcore.track_memory() as memory:
        y = chain(torch.ones(2**14, 8, requires_grad=True) * 2)
    assert memory.live_bytes > 1.9 * y.nbytes  # the output, and the kept input


def test_wrappers_of_several_tensors_are_checked():
    class Swap(nn.Module):
        def forward(self, a, b):
            return 2 * b, a

        def inverse(self, a, b):
            return b, a / 2

    assert revcore.check_invertible(memcnn.InvertibleModuleWrapper(Swap()), *torch.ones(2, 3, 4))


def test_example_of_the_last_release():
    x = torch.rand(2, 10, 8, 8)
    fn = memcnn.AdditiveCoupling(
        Fm=ExampleOperation(channels=10 // 2), Gm=ExampleOperation(channels=10 // 2)
    )
    assert memcnn.is_invertible_module(fn, test_input_shape=x.shape)
    wrapper = memcnn.InvertibleModuleWrapper(fn=fn, keep_input=True, keep_input_inverse=True)
    wrapper.eval()
    assert memcnn.is_invertible_module(wrapper, test_input_shape=x.shape)
    y = wrapper.forward(x)
    assert torch.allclose(x, wrapper.inverse(y), atol=1e-06)


def naive(a, branch, b):
    t = branch.f(b)
    return a * torch.exp(t) + t


def sigmoid(a, branch, b):
    t = branch.f(b)
    return a * torch.sigmoid(t[:, 1::2] + 2) + t[:, 0::2]


COUPLINGS = {
    "additive": (None, lambda a, branch, b: a + branch(b), 1),
    "naive": (memcnn.AffineAdapterNaive, naive, 1),
    "sigmoid": (memcnn.AffineAdapterSigmoid, sigmoid, 2),
}


def branch(factor):
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 3 * factor, 1)
    )


@pytest.mark.parametrize("implementation", [-1, 0, 1])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", COUPLINGS)
def test_gradients_are_those_of_plain_autograd(name, keep, implementation):
    adapter, combine, factor = COUPLINGS[name]
    block = memcnn.ReversibleBlock(
        branch(factor),
        coupling="additive" if adapter is None else "affine",
        keep_input=keep,
        implementation_fwd=implementation,
        implementation_bwd=implementation,
        adapter=adapter,
    ).double()
    twin = copy.deepcopy(block)

    def plain(x):
        x1, x2 = x.chunk(2, 1)
        y1 = combine(x1, twin._fn.Fm, x2)
        return torch.cat((y1, combine(x2, twin._fn.Gm, y1)), 1)

    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    assert_same(gradients(block, block, x), gradients(plain, twin, x))
    block.eval()
    torch.testing.assert_close(block.inverse(block(x)), x)


def test_an_affine_branch_may_return_scale_and_shift_itself():
    coupling = memcnn.AffineCoupling(memcnn.AffineAdapterNaive(nn.Linear(2, 2)))
    x = torch.randn(3, 4)
    assert torch.allclose(coupling.inverse(coupling(x)), x, atol=1e-5)


def test_names_of_a_state_dict_and_order_of_parameters():
    wrapper = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Linear(2, 2)))
    assert list(wrapper.state_dict()) == [
        "_fn.Gm.weight",
        "_fn.Gm.bias",
        "_fn.Fm.weight",
        "_fn.Fm.bias",
    ]
    adapted = memcnn.create_coupling(
        nn.Linear(2, 2), coupling="affine", adapter=memcnn.AffineAdapterNaive
    )
    assert next(name for name, _ in adapted.named_parameters()) == "Gm.f.weight"


def test_a_chain_of_wrappers_keeps_one_output():
    def kept(depth):
        wrapped = (
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Linear(8, 8)))
            for _ in range(depth)
        )
        chain = revcore.ReversibleSequential(*wrapped)
        x = torch.randn(16, 16)
        with revcore.track_memory() as memory:
            y = chain(x)
        assert y.requires_grad
        return memory.live_bytes

    assert kept(2) == kept(12)


def test_disable_is_the_opposite_of_reversing():
    wrapper = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Linear(2, 2)), disable=True)
    assert not wrapper.reversing
    assert not revcore.set_reversing(wrapper, True).disable
    wrapper.disable = True
    assert not wrapper.reversing


class Rotate(nn.Module):
    """Two tensors to two, with an inverse of its own."""

    def __init__(self):
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(0.3))

    def forward(self, a, b):
        return self.turn(a, b, self.angle)

    def inverse(self, a, b):
        return self.turn(a, b, -self.angle)

    def turn(self, a, b, angle):
        c, s = torch.cos(angle), torch.sin(angle)
        return c * a - s * b, s * a + c * b


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return x * self.log_scale.exp()

    def inverse(self, y):
        return y / self.log_scale.exp()


@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("fn", [Rotate, Scale])
def test_any_invertible_module(fn, way, keep, disable):
    fn = fn().double()
    count = 2 if isinstance(fn, Rotate) else 1
    wrapper = memcnn.InvertibleModuleWrapper(fn, keep, keep, disable=disable)
    found = []
    for run in (getattr(wrapper, way), getattr(fn, way)):
        torch.manual_seed(0)
        x = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(count)]
        y = run(*(3 * x_ for x_ in x))
        ys = y if isinstance(y, tuple) else (y,)
        assert len(ys) == count
        loss = sum((y_ * (i + 1)).sin().sum() for i, y_ in enumerate(ys))
        found.append(torch.autograd.grad(loss, [*x, *fn.parameters()]))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_tensors_of_several_dtypes():
    class Exchange(nn.Module):
        def forward(self, a, b):
            assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
            return a.double() + b, b.float()

        def inverse(self, a, b):
            return b, a - b.double()

    x = torch.randn(3, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = memcnn.InvertibleModuleWrapper(Exchange())(*x)
    plain = Exchange()(*x)
    torch.testing.assert_close(y, plain)
    found = (torch.autograd.grad(a.sin().sum() + b.cos().sum(), x) for a, b in (y, plain))
    torch.testing.assert_close(*found)


def test_a_kept_input_needs_no_inverse():
    class Broken(Scale):
        def inverse(self, y):
            return torch.full_like(y, torch.nan)

    fn = Broken().double()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    memcnn.InvertibleModuleWrapper(fn, keep_input=True)(x).sin().sum().backward()
    (plain,) = torch.autograd.grad(fn(x).sin().sum(), x)
    torch.testing.assert_close(x.grad, plain)


def test_several_tensors_keep_no_activations():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(Rotate() for _ in range(6))

        def forward(self, a, b):
            for part in self.parts:
                a, b = part(a, b)
            return a, b

        def inverse(self, a, b):
            for part in reversed(self.parts):
                a, b = part.inverse(a, b)
            return a, b

    kept = {}
    for disable in (False, True):
        wrapper = memcnn.InvertibleModuleWrapper(Deep(), disable=disable)
        a, b = torch.randn(2, 1000)
        with revcore.track_memory() as memory:
            y = wrapper(a, b)
            kept[disable] = memory.live_bytes
        del y
    assert kept[False] < kept[True] / 4


def test_the_callers_input_is_left_alone_and_precision_too():
    wrapper = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Linear(2, 2)))
    x = torch.randn(3, 4, requires_grad=True)
    before = x.detach().clone()
    wrapper(x).sum().backward()
    assert torch.equal(x, before)
    half = copy.deepcopy(wrapper).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(x.detach().bfloat16()).dtype == torch.bfloat16


def test_statistics_change_once_and_hooks_run():
    block = memcnn.ReversibleBlock(nn.BatchNorm1d(2))
    seen = []
    block._fn.Fm.register_forward_pre_hook(lambda *_: seen.append(1))
    block(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert block._fn.Fm.num_batches_tracked == 1
    assert seen


@pytest.mark.parametrize("name", ["implementation_fwd", "implementation_bwd"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_unknown_implementation(coupling, name):
    with pytest.raises(NotImplementedError, match=rf"{name} \(=-2\) must be -1, 0 or 1"):
        memcnn.ReversibleBlock(nn.Linear(2, 2), coupling=coupling, **{name: -2})


def test_unknown_coupling():
    with pytest.raises(NotImplementedError, match="coupling='unknown' is unknown"):
        memcnn.ReversibleBlock(nn.Linear(2, 2), coupling="unknown")


def test_signatures_are_memcnns():
    def names(function):
        return [str(p.name) for p in inspect.signature(function).parameters.values()]

    implementations = ["implementation_fwd", "implementation_bwd"]
    assert names(memcnn.AdditiveCoupling) == ["Fm", "Gm", *implementations, "split_dim"]
    assert names(memcnn.AffineCoupling) == ["Fm", "Gm", "adapter", *implementations, "split_dim"]
    keep = ["keep_input", "keep_input_inverse"]
    rest = ["num_bwd_passes", "disable", "preserve_rng_state"]
    assert names(memcnn.InvertibleModuleWrapper) == ["fn", *keep, *rest]
    assert names(memcnn.ReversibleBlock) == [
        *("Fm", "Gm", "coupling", *keep, *implementations, "adapter")
    ]


class TestIsInvertibleModule:
    def test_no_inverse(self):
        assert not memcnn.is_invertible_module(nn.Linear(2, 2), (3, 2))

    def test_wrong_inverse_and_no_trace(self):
        class Wrong(Scale):
            def inverse(self, y):
                return y * 3

        assert not memcnn.is_invertible_module(Wrong(), (3, 2))
        norm = memcnn.AdditiveCoupling(nn.BatchNorm1d(2))
        state = torch.get_rng_state()
        assert memcnn.is_invertible_module(norm, (5, 4))
        assert torch.equal(state, torch.get_rng_state())
        assert norm.Fm.num_batches_tracked == 0

    def test_several_tensors(self):
        assert memcnn.is_invertible_module(Rotate(), ((3, 2), (3, 2)))

    def test_it_warns_about_shared_tensors(self):
        class Same(nn.Module):
            def forward(self, x):
                return x

            inverse = forward

        with pytest.warns(UserWarning, match="forward returns its input"):
            assert memcnn.is_invertible_module(Same(), (3, 2))

    @pytest.mark.parametrize("shape", ["string", (2.3, 1.4), None, True, ((1, 3), False)])
    def test_bad_shape(self, shape):
        with pytest.raises(ValueError, match="must be a shape, or shapes, of integers"):
            memcnn.is_invertible_module(Scale(), shape)


def test_integers_beside_a_stream():
    class Picks(nn.Module):
        def forward(self, x, index):
            return 2 * x, index

        def inverse(self, y, index):
            return y / 2, index

    index = torch.tensor([2**24 + 1])
    x = torch.ones(1, requires_grad=True)
    stored = memcnn.InvertibleModuleWrapper(Picks(), disable=True)
    assert torch.equal(stored(x, index)[1], index)
    with pytest.raises(TypeError, match=r"got torch.float32, torch.int64; .* set disable=True"):
        memcnn.InvertibleModuleWrapper(Picks())(x, index)
