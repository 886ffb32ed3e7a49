"""Nothing that is not finite reaches the weights; a CUDA graph changes nothing but time."""

import math

import pytest
import torch
from torch import nn

import revcore
import revmodels
import revtrain
from revtrain.capture import why_not_capture
from revtrain.launch import make_accelerator
from revtrain.meter import Meter
from revtrain.net import NetSpec, memory_format, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.recipe import Recipe
from revtrain.step import TrainStep

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
STEPS = 8  # of which the last are replays, where there is a graph


class Run:
    """A tiny network, its step, and batches of noise."""

    def __init__(self, device, precision="no", reversing=True, graph=True, change=None):
        self.accelerator = make_accelerator(cpu=device == "cpu", mixed_precision=precision)
        torch.manual_seed(0)
        spec = NetSpec.of("revnet38", 10, 3, (2, 2, 2), (4, 8, 8, 8))
        net = spec.build(reversing=reversing)
        if change is not None:
            change(net)
        net = to_device(net, self.accelerator.device)
        recipe = Recipe(
            batch_size=16,
            lr=0.1,
            schedule="one-cycle",
            epochs=1,
            nesterov=True,
            weight_decay=1e-3,
            decay="weights",
            label_smoothing=0.1,
        )
        optimizer = make_optimizer(net, recipe)
        scheduler = make_scheduler(optimizer, recipe, 1000)
        self.net, self.optimizer, self.scheduler = self.accelerator.prepare(
            net, optimizer, scheduler
        )
        self.step = TrainStep(
            self.net,
            self.optimizer,
            self.scheduler,
            self.accelerator,
            label_smoothing=0.1,
            graph=graph,
        )
        self.generator = torch.Generator().manual_seed(1)

    def batch(self, size=16):
        device = self.accelerator.device
        x = torch.randn(size, 3, 8, 8, generator=self.generator)
        labels = torch.randint(10, (size,), generator=self.generator)
        return x.to(device, memory_format=memory_format(device)), labels.to(device)

    def take(self, x, labels):
        meter = Meter(self.accelerator.device)
        self.step(x, labels, meter)
        return meter.read().loss

    def state(self):
        """All that a step changes, copied."""
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        tensors = [*self.net.state_dict().values(), *momenta]
        return [tensor.detach().clone() for tensor in tensors]


@pytest.fixture
def deterministic():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, STEPS - 1])
def test_a_bad_batch_changes_nothing(device, value, at):
    run = Run(device)
    for _ in range(at):
        run.take(*run.batch())
    before = run.state()
    x, labels = run.batch()
    x[3, 1, 2, 2] = value
    run.take(x, labels)
    for _ in range(3):  # all later ones are masked as well, until the host looks
        run.take(*run.batch())
    assert all(map(torch.equal, before, run.state()))
    assert all(tensor.isfinite().all() for tensor in before)
    with pytest.raises(revtrain.NonFiniteLossError, match=r"rank 0: .* the images") as error:
        run.step.check()
    assert error.value.step == at + 1
    assert f"step {at + 1}," in str(error.value)


@pytest.mark.parametrize("device", DEVICES)
def test_good_steps_are_not_masked(device):
    run = Run(device)
    for _ in range(STEPS):
        before = run.state()
        assert math.isfinite(run.take(*run.batch()))
        assert not any(map(torch.equal, before, run.state()))
    run.step.check()


class Explode(nn.Module):
    """A branch whose output is infinite in the place of another's."""

    def forward(self, x):
        return x * 1e38 * 1e38


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, grad):
        return grad * math.inf


class GoodForward(nn.Module):
    def forward(self, x):
        return BadGradient.apply(x)


def explode(net):
    net.stages[1].chain[0].g = Explode()


def bad_gradient(net):
    net.norm = nn.Sequential(net.norm, GoodForward())


class Log(list):
    """A list that nobody puts back after the second run."""


class WithoutHooks(nn.Module):
    """A branch that computes in another way while it has hooks, as the kernels of revmodels do."""

    def __init__(self):
        super().__init__()
        self.seen = Log()

    def forward(self, x):
        self.seen.append(bool(self._forward_hooks))
        if not self._forward_hooks:
            (x,) = revcore.remember(lambda: (x.clone(),))
        return x * 1e38 * 1e38


def test_a_module_that_dislikes_hooks_has_them_in_both_passes():
    branch = WithoutHooks()
    run = Run("cpu", change=lambda net: setattr(net.stages[1].chain[0], "g", branch))
    run.take(*run.batch())
    branch.seen.clear()
    with pytest.raises(revtrain.NonFiniteLossError, match="WithoutHooks"):
        run.step.check()
    assert list(branch.seen) == [True, True]


@pytest.mark.parametrize("reversing", [True, False], ids=["reversing", "stored"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (explode, r"the output of module 'stages.1.chain.0.g' \(Explode\)"),
        (bad_gradient, "the gradient of parameter 'norm.0.bias'"),
    ],
)
def test_the_error_names_the_first_module(reversing, change, what):
    run = Run("cpu", reversing=reversing, change=change)
    before = run.state()
    run.take(*run.batch())
    with pytest.raises(revtrain.NonFiniteLossError, match=what):
        run.step.check()
    assert all(map(torch.equal, before, run.state()))
    assert all(parameter.grad is None for parameter in run.net.parameters())


def test_the_step_looks_by_itself():
    run = Run("cpu")
    x, labels = run.batch(2)
    for _ in range(99):
        run.take(x * math.nan, labels)
    with pytest.raises(revtrain.NonFiniteLossError, match="step 1, on rank 0"):
        run.take(x, labels)


def test_what_cannot_be_captured_is_named():
    assert Run("cpu").step.why_no_graph == "the device is cpu"
    net = nn.Sequential(nn.Linear(1, 1))
    assert why_not_capture(net) is None
    handle = net[0].register_forward_hook(lambda *_: None)
    assert why_not_capture(net) == "module '0' (Linear) has hooks, which run in Python"
    handle.remove()
    assert why_not_capture(net) is None


@pytest.fixture
def always_fused(monkeypatch):
    """The kernels of a captured step, also for one that is launched from Python."""
    monkeypatch.setattr("revtrain.step.set_fused", lambda net, _: revmodels.set_fused(net, True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graph", [True, False])
def test_batch_norm_is_fused_where_a_graph_will_be_made(device, graph):
    run = Run(device, graph=graph)
    norms = [module for module in run.net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.fused for norm in norms} == {graph and device == "cuda"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reversing", [True, False], ids=["reversing", "stored"])
@pytest.mark.usefixtures("deterministic")
def test_weights_that_are_cast_at_once_give_the_same_bits(device, reversing):
    runs = [Run(device, "bf16", reversing) for _ in range(2)]
    assert len(runs[0].step._weights._copies) > 10
    runs[1].step._weights = None
    losses = [[run.take(*run.batch()) for _ in range(STEPS)] for run in runs]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *(run.state() for run in runs)))
    assert {p.dtype for p in runs[0].net.parameters()} == {torch.float32}


@needs_cuda
@pytest.mark.usefixtures("deterministic", "always_fused")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("reversing", [True, False], ids=["reversing", "stored"])
def test_a_graph_gives_the_same_bits(precision, reversing):
    losses, states = [], []
    for graph in (True, False):
        run = Run("cuda", precision, reversing, graph)
        losses.append([run.take(*run.batch()) for _ in range(STEPS)])
        states.append(run.state())
        assert run.step.captured is graph, run.step.why_no_graph
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *states))


@needs_cuda
@pytest.mark.usefixtures("deterministic", "always_fused")
def test_another_shape_is_no_replay_and_leaves_the_graph_whole():
    sizes = [16, 16, 16, 16, 16, 7, 16, 16]
    losses = []
    for graph in (True, False):
        run = Run("cuda", graph=graph)
        losses.append([run.take(*run.batch(size)) for size in sizes])
    assert losses[0] == losses[1]


@needs_cuda
@pytest.mark.usefixtures("deterministic")
def test_a_state_dict_goes_into_a_graph_after_a_reset():
    run = Run("cuda")
    for _ in range(STEPS):
        run.take(*run.batch())
    kept = run.net.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict()
    kept = [
        torch.utils._pytree.tree_map(lambda v: v.clone() if torch.is_tensor(v) else v, k)
        for k in kept
    ]
    batches = [run.batch() for _ in range(STEPS)]
    first = [run.take(*batch) for batch in batches]
    run.net.load_state_dict(kept[0])
    run.optimizer.load_state_dict(kept[1])
    run.scheduler.load_state_dict(kept[2])
    run.step.reset()
    assert [run.take(*batch) for batch in batches] == first


@needs_cuda
def test_float16_finds_its_scale():
    run = Run("cuda", "fp16")
    run.accelerator.scaler._init_scale = 2.0**40  # overflows at first, which is no error
    before = run.state()
    run.take(*run.batch())
    assert all(map(torch.equal, before, run.state()))
    for _ in range(40):
        run.take(*run.batch())
    run.step.check()
    assert not any(map(torch.equal, before, run.state()))
    assert run.step.why_no_graph == "the loss is scaled for float16"


@needs_cuda
def test_float16_that_stays_bad_is_an_error():
    run = Run("cuda", "fp16")
    x, labels = run.batch()
    for _ in range(99):
        run.take(x * math.nan, labels)
    with pytest.raises(revtrain.NonFiniteLossError, match="step 1, on rank 0"):
        run.take(x, labels)


@needs_cuda
@pytest.mark.usefixtures("deterministic", "always_fused")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_with_graphs_has_the_loss_curve_of_one_without(train, precision):
    options = {"cpu": False, "mixed_precision": precision, "batch_size": 100}
    one, other = (train(out=str(graph), graph=graph, **options) for graph in (True, False))
    keys = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    curves = [[[record[key] for key in keys] for record in run.metrics] for run in (one, other)]
    assert curves[0] == curves[1]
