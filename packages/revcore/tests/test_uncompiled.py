"""What a compiled chain refuses, or leaves to the eager engine where graph breaks are allowed."""

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from cases import assert_same, compiled, gradients, make_case, traceable
from torch import nn

import revcore
from revcore.tape import Tape

pytestmark = [traceable, pytest.mark.usefixtures("fresh_compiler")]


def drops():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))


class DropsByFunction(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("branch", [drops, lambda: DropsByFunction(4, 4)])
def test_random_numbers_are_refused_or_left_to_the_eager_engine(branch):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).double()
    state = copy.deepcopy(chain.state_dict())
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(Exception, match="random numbers in a branch cannot be repeated"):
        compiled(chain)(x.clone().requires_grad_())
    torch.compiler.reset()
    torch.manual_seed(3)
    ours = gradients(compiled(chain, fullgraph=False), chain, x)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    torch.manual_seed(3)
    assert_same(ours, gradients(twin, twin, x))
    assert_same(chain.state_dict(), state)
    torch.compiler.reset()
    assert compiled(chain.eval())(x.requires_grad_()).shape == x.shape


def test_fixed_point_is_refused_and_its_branches_can_be_compiled():
    case = make_case("fixed-point", "mlp")
    with pytest.raises(Exception, match="fixed-point chain cannot be compiled as a whole"):
        compiled(case.chain)(case.x.clone().requires_grad_())


@pytest.mark.parametrize("hooked", ["1", "1.coupling"])
def test_a_hook_on_a_block_is_refused(hooked):
    case = make_case("additive", "mlp")
    block = case.chain.get_submodule(hooked)
    for register in (block.register_forward_hook, block.register_full_backward_hook):
        hook = register(lambda *_: None)
        with pytest.raises(Exception, match="has a hook, or a forward or inverse of its own"):
            compiled(case.chain)(case.x.clone().requires_grad_())
        hook.remove()
        torch.compiler.reset()
    compiled(case.chain)(case.x.clone().requires_grad_())


def test_tensors_inside_of_arguments_are_refused():
    class Conditioned(nn.Linear):
        def forward(self, x, condition):
            return super().forward(x) * condition[0]

    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Conditioned(4, 4)))
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(Exception, match="none inside of lists"):
        compiled(chain)(x, condition=[torch.ones(4)])


class OwnForward(revcore.AdditiveCoupling):
    def forward(self, *x, **kwargs):
        return super().forward(*x, **kwargs)


class OwnBlock(revcore.ReversibleBlock):
    def forward(self, *x, **kwargs):
        return super().forward(*x, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: revcore.ReversibleBlock(nn.Linear(4, 4), coupling=OwnForward),
        lambda: revcore.ReversibleSequential(OwnBlock(nn.Linear(4, 4))),
    ],
    ids=["of a coupling", "of a block"],
)
def test_a_forward_of_its_own_is_refused(make):
    with pytest.raises(Exception, match="has a hook, or a forward or inverse of its own"):
        compiled(make())(torch.randn(3, 8, requires_grad=True))


class Attributes(nn.Linear):
    """Changes an attribute, and keeps a result in another."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        y = super().forward(x) * self.calls
        self.last = y.detach()
        return y


class Checkpointed(nn.Linear):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Hooked(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_full_backward_hook(lambda *_: None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("branch", [Attributes, Checkpointed, Hooked])
def test_what_cannot_be_compiled_is_left_to_the_eager_engine(branch, device):
    torch.manual_seed(0)
    blocks = (revcore.ReversibleBlock(branch(4, 4), branch(4, 4)) for _ in range(2))
    chain = revcore.ReversibleSequential(*blocks).to(device, torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    compiled = torch.compile(chain, backend="aot_eager")
    for _ in range(2):
        found = []
        for net, parameters in ((compiled, chain.parameters()), (twin, twin.parameters())):
            found.append(list(torch.autograd.grad(net(x).square().sum(), list(parameters))))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    copy.deepcopy(chain)
    if branch is Attributes:
        counts = [block.coupling.f.calls for block in (*chain, *twin)]
        assert counts == [2] * 4


def test_a_tensor_that_an_adapter_finds_elsewhere_compiled(device):
    torch.manual_seed(0)
    alpha = torch.ones((), device=device, requires_grad=True)

    def adapter(t):
        return (alpha * t).exp(), t

    coupling = revcore.AffineCoupling(nn.Linear(4, 4), nn.Linear(4, 4), adapter=adapter)
    chain = revcore.ReversibleSequential(coupling).to(device)
    with pytest.raises(Exception, match=r"uses a tensor of shape|Observed exception"):
        torch.compile(chain, backend="aot_eager")(torch.randn(5, 8, device=device)).sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_backward_pass_that_is_compiled(device):
    """The eager engine under compiled autograd, which traces what nodes do in Python."""
    from torch._dynamo import compiled_autograd  # noqa: PLC0415 - takes seconds

    case = make_case("additive", "conv2d", device=device)
    plain = gradients(case.plain, case.chain, case.x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        ours = gradients(case.chain, case.chain, case.x)
    assert_same(
        {name: value for name, value in ours.items() if not name.startswith("buffer")},
        {name: value for name, value in plain.items() if not name.startswith("buffer")},
    )


@pytest.mark.parametrize("inside", [True, False])
def test_parametrizations_that_are_cached(inside):
    def make():
        torch.manual_seed(0)
        branch = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        return revcore.ReversibleSequential(revcore.ReversibleBlock(branch, nn.Identity())).double()

    def cached(function):
        def run(x):
            with nn.utils.parametrize.cached():
                return function(x)

        return run

    x = torch.randn(5, 8, dtype=torch.float64)
    found = []
    for fullgraph in (True, False):
        chain = make()
        function = compiled(cached(chain) if inside else chain, fullgraph=fullgraph)
        function = function if inside else cached(function)
        if fullgraph:
            with pytest.raises(Exception, match=r"cannot be in parametrize\.cached"):
                function(x)
        else:
            found = gradients(function, chain, x)
        torch.compiler.reset()
    chain = revcore.set_reversing(make(), False)
    assert_same(found, gradients(cached(chain), chain, x))


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch 2.11 does not tell of such hooks")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_hooks_on_saved_tensors_around_what_is_not_traced_yet(fullgraph):
    case = make_case("additive", "mlp")
    function, x = compiled(case.chain, fullgraph=fullgraph), case.x.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        if fullgraph:
            with pytest.raises(Exception, match=r"under hooks on saved tensors.*call it once"):
                function(x)
        else:
            torch.testing.assert_close(function(x), case.chain(x))
    function(x)
    with torch.autograd.graph.save_on_cpu():  # nothing has forbidden them
        torch.testing.assert_close(function(x), case.chain(x))


@dataclass
class Config:
    scale: float = 2.0


class Configured(nn.Linear):
    def forward(self, x, config=None, numbers=None):
        scale = numbers[0]["scale"] if config is None else config.scale
        return super().forward(x) * scale


def test_objects_as_arguments():
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Configured(4, 4))).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    plain = gradients(lambda x: chain(x, config=Config()), chain, x)
    with pytest.raises(Exception, match=r"no object of Config; pass what it holds"):
        compiled(chain)(x.clone().requires_grad_(), config=Config())
    torch.compiler.reset()
    function = compiled(chain, fullgraph=False)
    assert_same(gradients(lambda x: function(x, config=Config()), chain, x), plain)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch 2.11 does not see it as a constant")
def test_nested_numbers_that_change():
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Configured(4, 4))).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    function = compiled(chain)
    for scale in (2.0, 3.0, 4.0):
        numbers = [{"scale": scale}]
        ours = gradients(lambda x, given=numbers: function(x, numbers=given), chain, x)
        plain = gradients(lambda x, given=numbers: chain(x, numbers=given), chain, x)
        assert_same(ours, plain)


class Breaking(nn.Module):
    """Cannot be traced where it is undone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return x * self.scale

    def inverse(self, y):
        torch._dynamo.graph_break()
        return y / self.scale


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_fails_later_is_left_to_the_eager_engine(monkeypatch):
    blocks = revcore.ReversibleBlock(nn.Linear(4, 4)), Breaking()
    chain = revcore.ReversibleSequential(*blocks).double()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x, engines = torch.randn(3, 8, dtype=torch.float64), []
    monkeypatch.setattr(Tape, "seal", lambda *_, **__: engines.append("eager"))
    compiled(chain, fullgraph=False)(x)
    assert engines == ["eager"]
    monkeypatch.undo()
    torch.compiler.reset()
    ours = gradients(compiled(chain, fullgraph=False), chain, x)
    assert_same(ours, gradients(twin, twin, x))


def test_a_chain_runs_eagerly_while_another_thread_compiles(monkeypatch):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(4, 4)))
    compiles, eager, stop = [], [], threading.Event()
    engine = revcore.reversible.Reversible
    monkeypatch.setattr(engine, "_compiled", lambda _, x, *__, **___: compiles.append(x) or x[0])

    def run():
        while not stop.is_set():
            eager.append(chain(torch.randn(3, 8)))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        torch.compiler.reset()
        compiled(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))(torch.randn(3, 4)).sum().backward()
    stop.set()
    thread.join()
    assert eager
    assert not compiles
