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


def inner_chain():
    return revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(2, 2)))


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


class Averaging(nn.Module):
    """Changes a buffer that it reads."""

    def __init__(self, *, in_place):
        super().__init__()
        self.linear, self.in_place = nn.Linear(4, 4), in_place
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        if self.in_place:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.abs().mean(0))
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().abs().mean(0)
        return self.linear(x) / self.mean


class Uncounted(nn.Module):
    """Changes a buffer in a way that torch does not count, or not on tensors without data."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        h = self.linear(x)
        if self.how == "data":
            self.mean.data.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        elif self.how == "foreach":
            torch._foreach_mul_([self.mean], 0.9)
        else:
            h = nn.functional.batch_norm(h, self.mean, self.var, training=True)
        return (h * (1 + self.mean.clone())).tanh()


class ReadsStatistics(nn.Module):
    def __init__(self, how="product"):
        super().__init__()
        self.norm, self.linear, self.how = nn.BatchNorm1d(4), nn.Linear(4, 4), how

    def forward(self, x):
        h, norm = self.linear(self.norm(x)) * 1, self.norm
        if self.how == "product":
            h = h * (1 + norm.running_mean)
        elif self.how == "in place":
            h += norm.running_mean
        else:
            mean, var = norm.running_mean, norm.running_var
            h = nn.functional.batch_norm(h, None, None, weight=var, bias=mean, training=True)
        return h.tanh()


class Average(nn.Module):
    """Changes a tensor that is no buffer, and what another module has that it holds unseen."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.hidden = nn.Linear(4, 4), []
        if how == "hidden":
            self.hidden.append(nn.BatchNorm1d(4, affine=False).double())
        self.mean = torch.ones(4, dtype=torch.float64) if how == "attribute" else None

    def forward(self, x):
        h = self.linear(x)
        for norm in self.hidden:
            h = norm(h)
        if self.mean is not None:
            self.mean.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        return h


@torch.library.custom_op("revcore_tests::mask", mutates_args=())
def mask(x: torch.Tensor) -> torch.Tensor:
    return (torch.rand_like(x) > 0.5).to(x.dtype)


mask.register_fake(torch.empty_like)


class DropsUnseen(nn.Linear):
    """Draws random numbers where no mode of torch sees it."""

    def forward(self, x):
        return super().forward(x) * mask(x.detach())


class Remembers(nn.Linear):
    """Decides by what rounding turns over."""

    def forward(self, x):
        (mask,) = revcore.remember(lambda: ((x * 1e15).sin() > 0,))
        return super().forward(x) * mask


class Deciding(nn.Module):
    """Looks at its data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * float(x.detach().sum().item() > 0)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (lambda: Averaging(in_place=True), "changes its buffer 'mean'"),
        (lambda: Averaging(in_place=False), "changes its buffer 'mean'"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "changes its buffer"),
        (Deciding, "looks at its data"),
        (lambda: Uncounted("data"), "changes its buffer 'mean'"),
        (lambda: Uncounted("foreach"), "changes its buffer 'mean'"),
        (lambda: Uncounted("batch_norm"), "changes its buffer 'mean'"),
        (ReadsStatistics, "reads statistics that its batch norm changes"),
        (lambda: ReadsStatistics("in place"), "reads statistics that its batch norm changes"),
        (lambda: ReadsStatistics("weight"), "reads statistics that its batch norm changes"),
        (lambda: Average("attribute"), "changes an attribute"),
        (lambda: Average("hidden"), "changes its buffer"),
        (lambda: DropsUnseen(4, 4), "random numbers in a branch"),
        (lambda: Remembers(4, 4), "calls revcore.remember"),
        (inner_chain, "a chain inside of a branch"),
    ],
    ids=[
        *("in place", "rebound", "spectral norm", "data", ".data", "foreach", "F.batch_norm"),
        *("statistics", "in place", "as a weight", "attribute", "hidden", "custom operation"),
        *("remember", "chain"),
    ],
)
def test_what_is_refused_is_left_to_the_eager_engine(branch, message):
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(branch())).double()
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(Exception, match=message):
        compiled(chain)(x.clone().requires_grad_())
    torch.compiler.reset()
    torch.manual_seed(3)
    ours = gradients(compiled(chain, fullgraph=False), chain, x)
    torch.manual_seed(3)
    assert_same(ours, gradients(twin, twin, x))
    assert_same(chain.state_dict(), twin.state_dict())
    if isinstance(chain[0].coupling.f, Average):
        one, two = (net[0].coupling.f for net in (chain, twin))
        for norm, other in zip(one.hidden, two.hidden, strict=True):
            assert_same(norm.state_dict(), other.state_dict())
        assert one.mean is None or torch.equal(one.mean, two.mean)


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


TABLES = {}


def table(size):
    if size not in TABLES:
        TABLES[size] = torch.arange(size).sin()[:, None]
    return TABLES[size]


def test_a_table_that_a_branch_caches():
    """What is tried out while it is traced must leave nothing but true tensors behind."""

    class Tabled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * table(len(x))

    TABLES.clear()
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(Tabled(4, 4))).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    ours = gradients(compiled(chain), chain, x)
    assert type(TABLES[5]) is torch.Tensor
    assert_same(ours, gradients(revcore.set_reversing(chain, False), chain, x))


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


class Estimated(nn.Module):
    """Has a log-determinant that it estimates by chance."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8, 8))

    def forward(self, x):
        return x + x @ self.weight

    def inverse(self, y):
        return torch.linalg.solve((torch.eye(8).to(y) + self.weight).T, y.T).T

    def log_det(self, x):
        v = torch.randn_like(x)
        return (v @ self.weight * v).sum(1)


def test_a_log_determinant_that_draws_random_numbers():
    chain = revcore.ReversibleSequential(Estimated(), log_det=True).double()
    with pytest.raises(Exception, match="random numbers in a branch cannot be repeated"):
        compiled(chain)(torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


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
    chain = revcore.ReversibleSequential(revcore.ReversibleBlock(nn.Linear(4, 4)), Breaking())
    chain, twin = chain.double(), copy.deepcopy(chain.double())
    revcore.set_reversing(twin, False)
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
    engines, stop = [], threading.Event()
    monkeypatch.setattr(revcore.reversible.Reversible, "_compiled", lambda *_, **__: engines.append)

    def run():
        x = torch.randn(3, 8)
        while not stop.is_set():
            engines.append(type(chain(x)))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        torch.compiler.reset()
        compiled(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))(torch.randn(3, 4)).sum().backward()
    stop.set()
    thread.join()
    assert {*engines} == {torch.Tensor}
