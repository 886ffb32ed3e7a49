"""What the backward pass of a branch finds in its modules, and leaves there."""

import copy
import warnings

import pytest
import torch
from cases import SCHEMES, assert_as_stored, chain_of_branches, make_case, step_of
from torch import nn
from torch.autograd.graph import GradientEdge

import revcore


@pytest.fixture
def x(device):
    torch.manual_seed(0)
    return torch.randn(6, 8, dtype=torch.float64, device=device)


def normalized():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


class Samples:
    """Computes gradients by sample, as differentially private training does."""

    def __init__(self, layer, where):
        self.where, self.found = where, []
        if where == "list":
            layer.activations = []
        layer.register_forward_hook(self.note)
        layer.register_full_backward_hook(self.use)

    def note(self, layer, inputs, _):
        if not torch.is_grad_enabled():
            return
        if self.where == "list":
            layer.activations.append(inputs[0].detach())
        else:
            layer.activation = inputs[0].detach()

    def use(self, layer, _, grads):
        seen = layer.activations.pop() if self.where == "list" else layer.activation
        layer.steps = getattr(layer, "steps", 0) + 1
        layer.samples = torch.einsum("ni,nj->nij", grads[0], seen)


@pytest.mark.parametrize("where", ["list", "attribute"])
@pytest.mark.parametrize("branch", [plain, normalized])
def test_hooks_find_what_the_forward_pass_noted(branch, where, x):
    chain = chain_of_branches(branch()).double().to(x.device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    layers = [net[0].coupling.f[0] for net in (chain, twin)]
    for layer in layers:
        Samples(layer, where)
    for number in range(3):
        for net in (chain, twin):
            step_of(net, x + number)
        ours, theirs = layers
        torch.testing.assert_close(ours.samples, theirs.samples)
        torch.testing.assert_close(ours.samples.sum(0), ours.weight.grad)
        assert ours.steps == theirs.steps == number + 1
        assert len(vars(ours).get("activations", ())) == 0


class Counts(nn.Module):
    """Notes both passes, in what it has and in what it makes anew."""

    def __init__(self):
        super().__init__()
        self.linear, self.steps, self.log = nn.Linear(4, 4), 0, []

    def forward(self, x):
        self.steps += 1
        self.log.append("forward")
        self.norms = {"forward": 1}
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(self.note)
        return torch.tanh(y)

    def note(self, grad):
        self.steps += 1
        self.log.append("backward")
        self.norms["backward"] = grad.norm()


@pytest.mark.parametrize("calls", [1, 2])
def test_what_both_passes_note(calls, x):
    chain = chain_of_branches(Counts()).double().to(x.device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for _ in range(2):
        for net in (chain, twin):
            sum(net(number * x).square().sum() for number in range(1, calls + 1)).backward()
        for ours, theirs in zip(chain.modules(), twin.modules(), strict=True):
            if isinstance(ours, Counts):
                assert (ours.steps, ours.log) == (theirs.steps, theirs.log)
                torch.testing.assert_close(ours.norms, theirs.norms)


class Scaling(torch.autograd.Function):
    """Divides gradients by the largest that it has seen, as training in low precision does."""

    @staticmethod
    def forward(ctx, x, peak):
        ctx.peak = peak
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.peak.copy_(torch.maximum(ctx.peak, grad.abs().max()))
        return grad / ctx.peak, None


class Scaled(nn.Module):
    def __init__(self, count=False):
        super().__init__()
        self.linear, self.count = nn.Linear(4, 4), count
        self.register_buffer("peak", torch.full((1,), 1e-3))

    def forward(self, x):
        if self.count:
            self.peak += 1
        return Scaling.apply(self.linear(x), self.peak)


def test_buffers_that_the_backward_pass_changes(x):
    chain = assert_as_stored(lambda: chain_of_branches(Scaled()), x, steps=3)
    assert all(buffer > 1e-3 for buffer in chain.buffers())


def test_buffers_that_both_passes_change_are_refused(x):
    chain = chain_of_branches(Scaled(count=True)).double().to(x.device)
    with pytest.raises(
        RuntimeError, match="buffer 'peak' of Scaled is changed in the backward pass"
    ):
        step_of(chain, x)


class Energy(nn.Module):
    """Differentiates by its own input, which need not require a gradient."""

    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(self.inner(x).square().sum(), x, create_graph=True)[0]


class Hamiltonian(Energy):
    """Makes a leaf of its input where that requires no gradient."""

    def forward(self, x):
        return super().forward(x if x.requires_grad else x.detach())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("branch", [Energy, Hamiltonian])
def test_a_branch_that_differentiates_by_its_input(branch, needs_x, frozen, x):
    def take(net, x):
        net.zero_grad()
        x = x.clone().requires_grad_(needs_x)
        net(x).square().sum().backward()
        leaves = [p for p in net.parameters() if p.requires_grad]
        return [p.grad for p in leaves] + ([x.grad] if needs_x else [])

    def make():
        chain = chain_of_branches(branch())
        chain[0].requires_grad_(not frozen)
        return chain

    assert_as_stored(make, x, take)


def replica_of(net):
    """Does what nn.DataParallel does for each GPU."""
    modules = list(net.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            held = None if parameter is None else parameter * 1
            setattr(replica, name, held)
            replica._former_parameters[name] = held
    return replicas[net]


@pytest.mark.parametrize("branch", [plain, Energy])
def test_replicas_of_data_parallel(branch, x):
    def take(net, x):
        net.zero_grad()
        x = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replica_of(net)(x).square().sum().backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    assert_as_stored(lambda: chain_of_branches(branch()), x, take)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_optimizer_that_steps_as_gradients_come(scheme, streams, device):
    def step(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.01)
        parameter.grad = None

    case = make_case(scheme, "mlp", device=device)
    found = []
    for chain in (case.chain, revcore.set_reversing(case.twin(), False)):
        for parameter in chain.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(2):
            x = case.x.clone().requires_grad_()
            y = chain(*x.chunk(streams, 1))
            (y if streams == 1 else torch.cat(y, 1)).square().sum().backward()
        found.append([x.grad, *chain.parameters()])
    torch.testing.assert_close(*found)


class Force(Energy):
    """Takes its input as it is, if that requires a gradient."""

    def forward(self, x):
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.inner(z).square().sum(), z, create_graph=True)[0]


@pytest.mark.parametrize("reversing", [False, True])
def test_a_branch_that_differentiates_by_its_input_without_gradients(reversing, x):
    chain = chain_of_branches(Force()).to(x)
    revcore.set_reversing(chain, reversing)
    streams = [stream.contiguous() for stream in x.chunk(2, 1)]
    with torch.no_grad():
        expected = chain(*streams)
        needing = [stream.clone().requires_grad_() for stream in streams]
        torch.testing.assert_close(chain(*needing), expected)


class Secret(nn.Module):
    """Reads a tensor that is neither its input nor a parameter."""

    def __init__(self, tensor):
        super().__init__()
        self.linear, self.secret = nn.Linear(4, 4), (tensor,)

    def forward(self, x):
        return self.linear(x * self.secret[0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("keep_input", [False, True])
def test_a_stream_that_shares_memory_with_a_tensor_from_elsewhere(keep_input, frozen):
    weight = torch.randn(6, 4, requires_grad=True)
    block = revcore.ReversibleBlock(Secret(weight), nn.Linear(4, 4), keep_input=keep_input)
    block.coupling.f.requires_grad_(not frozen)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        block(torch.randn(6, 4), weight.detach())[1].sum().backward()


class Floors(nn.Module):
    """Returns integers, which have no gradient."""

    def forward(self, x):
        return (x > 0).long()


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_branch_that_returns_integers(coupling, x):
    def make():
        return revcore.ReversibleSequential(
            revcore.ReversibleBlock(plain(), Floors(), coupling=coupling),
            revcore.ReversibleBlock(plain(), plain(), coupling=coupling),
        )

    assert_as_stored(make, x)


class Merged(nn.Module):
    """Uses a weight that was computed from its parameters before."""

    def __init__(self):
        super().__init__()
        self.base, self.factor = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def merge(self):
        self.weight = self.base + self.factor @ self.factor.T

    def forward(self, x):
        return torch.tanh(x @ self.weight)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_weight_that_was_computed_before_the_calls(calls, x):
    def make():
        branch = Merged()
        return revcore.ReversibleSequential(revcore.ReversibleBlock(branch, branch))

    def take(net, x):
        net.zero_grad()
        net[0].coupling.f.merge()
        x = x.clone().requires_grad_()
        sum(net(x * number).square().sum() for number in range(calls)).backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    assert_as_stored(make, x, take)


class Watched(nn.Module):
    """Registers a hook on a result of its own."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        y = self.linear(x)
        if self.how != "where there is a graph" or y.requires_grad:
            y.retain_grad() if self.how == "retained" else y.register_hook(lambda grad: 2 * grad)
        return y.tanh()


def test_hooks_on_results_of_a_branch(x):
    assert_as_stored(lambda: chain_of_branches(Watched("where there is a graph")), x)
    for how in ("at once", "retained"):
        with pytest.raises(RuntimeError, match="branch Watched needs a graph of its own run"):
            chain_of_branches(Watched(how)).to(x)(x.requires_grad_())


def nodes_of(y):
    """Lists the nodes of a chain from the first to the last."""
    found, following = [], y.grad_fn
    while following is not None:
        if type(following).__name__ == "_StepsNodeBackward":
            found.append(following)
        following = next((n for n, _ in following.next_functions if n is not None), None)
    return found[::-1]


def leaves_of(node):
    found = [n.variable for n, _ in node.next_functions if hasattr(n, "variable")]
    return [leaf for leaf in found if isinstance(leaf, nn.Parameter)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nodes_that_are_differentiated_one_by_one(scheme, order, device):
    """Pipelines do so that put off the gradients of parameters ("zero bubble")."""
    case = make_case(scheme, "conv2d", device=device)
    x = case.x.clone().requires_grad_()
    y = case.chain(x)
    loss = y.sin().sum()
    nodes, came = nodes_of(y), {}
    assert len(nodes) == 3
    hooks = [n.register_prehook(lambda g, n=n: came.__setitem__(n, g)) for n in nodes]
    parameters = [*case.chain.parameters()]
    expected = dict(
        zip(
            parameters,
            torch.autograd.grad(loss, parameters, retain_graph=True),
            strict=True,
        )
    )
    for hook in hooks:
        hook.remove()
    for index in order:
        node = nodes[index]
        edges = [GradientEdge(node, i) for i, g in enumerate(came[node]) if g is not None]
        leaves = leaves_of(node)
        found = torch.autograd.grad(edges, leaves, [g for g in came[node] if g is not None])
        for leaf, grad in zip(leaves, found, strict=True):
            torch.testing.assert_close(grad, expected.pop(leaf))
    assert not expected
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_an_intermediate_result_and_then_the_rest_without_a_retained_graph(device):
    case = make_case("additive", "conv2d", device=device)
    middle = []
    case.chain[1].register_forward_hook(lambda _module, _x, y: middle.append(y[0]))
    parts = [list(part.parameters()) for part in (case.chain[:2], case.chain[2:])]

    def step():
        middle.clear()
        y = case.chain(case.x)
        before = torch.autograd.grad(middle[0].sin().sum(), parts[0], allow_unused=True)
        return [*before, *torch.autograd.grad(y.sin().sum(), parts[1])]

    ours = step()
    revcore.set_reversing(case.chain, False)
    for one, two in zip(ours, step(), strict=True):
        assert (one is None) is (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)
