"""What is compiled ahead is what a step launches, and nothing else happens."""

import copy

import pytest
import torch
import torch.nn.functional as F

import revcore
import revmodels
from revmodels import fused, launch
from revmodels.branches import make_branch
from revmodels.fused import load

passes = pytest.importorskip("revmodels.passes", reason="there is no Triton", exc_type=ImportError)
conv_passes = pytest.importorskip("revmodels.conv_passes")
pytest.importorskip("numpy", reason="Triton's interpreter needs it")


def make_net(kind, device, blocks=2):
    torch.manual_seed(0)
    if kind == "resnet":
        net = revmodels.ResNet("basic", (2, 2), (8, 8, 24), 5)
    elif kind == "recompute":
        net = revmodels.RevNet("basic", (1, 2), (16, 16, 32), 5, recompute=True)
    elif kind == "fixed point":
        branches = [make_branch("basic", 16, 16) for _ in range(4)]
        net = revcore.ReversibleSequential(
            revcore.FixedPointCoupling(*branches[:2]), revcore.FixedPointCoupling(*branches[2:])
        )
    else:
        net = revmodels.RevNet(kind, (blocks, blocks), (16, 16, 32), 5)
    net.to(device, memory_format=torch.channels_last)
    return revmodels.set_fused(net, True)


def batch(kind, device):
    x = torch.randn(2, 32 if kind == "fixed point" else 3, 4, 4, device=device)
    return x.to(memory_format=torch.channels_last)


def step(net, x):
    y = net(x)
    F.cross_entropy(y.flatten(1), torch.zeros(len(y), dtype=torch.long, device=y.device)).backward()


@pytest.fixture
def compiled(monkeypatch, device):
    """Collects what would be compiled, after the kernels have been compared with torch."""
    assert load("passes", device.type) is passes
    assert load("conv_passes", device.type) is conv_passes
    found = []
    monkeypatch.setattr(launch._Compiler, "add", lambda _, *what: found.append(what))
    return found


@pytest.fixture
def launched(monkeypatch):
    """Collects what is launched."""
    found = []

    def note(kernel, grid, *arguments, **options):
        if not launch.is_fake(arguments[0]):
            found.append((kernel, arguments, options))
        launch.launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(passes, "launch", note)
    monkeypatch.setattr(conv_passes, "launch", note)
    return found


KINDS = ["basic", "bottleneck", "resnet", "recompute", "fixed point"]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bottleneck", None), *((kind, torch.bfloat16) for kind in KINDS)]
)
def test_what_is_compiled_is_what_a_step_launches(device, compiled, launched, kind, dtype):
    net, x = make_net(kind, device), batch(kind, device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        revmodels.compile_ahead(net, x)
        assert not launched
        step(net, x)
    ahead = {launch.kind_of(*what) for what in compiled}
    needed = {launch.kind_of(*what) for what in launched}
    assert needed
    assert needed <= ahead
    # Another loss has gradients of other dtypes at most.
    assert len(ahead - needed) <= 2


def test_what_compares_the_kernels_with_torch_is_compiled_with_them(
    device, compiled, launched, monkeypatch
):
    net, x = make_net("basic", device), batch("basic", device)
    monkeypatch.setattr(fused, "_loaded", {})
    revmodels.compile_ahead(net, x)
    assert not launched
    assert not fused._loaded  # nothing has been compared
    ahead = {launch.kind_of(*what) for what in compiled}
    assert load("passes", device.type) is passes
    assert load("conv_passes", device.type) is conv_passes
    assert launched
    assert {launch.kind_of(*what) for what in launched} <= ahead


def test_nothing_changes(device, compiled):
    net = make_net("basic", device, 1)
    twin, x = copy.deepcopy(net), batch("basic", device)
    state = torch.get_rng_state()
    revmodels.compile_ahead(net, x)
    assert compiled
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert type(one) is torch.Tensor
        assert torch.equal(one, two)
    assert all(parameter.grad is None for parameter in net.parameters())
    step(net, x)
    step(twin, x)
    for one, two in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_a_forward_of_the_net_itself_is_not_called(device, compiled):
    net, x = make_net("basic", device), batch("basic", device)
    own = net.forward
    net.forward = lambda x: own(x)  # noqa: PLW0108 - as accelerate does
    revmodels.compile_ahead(net, x)
    assert compiled
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_net_that_looks_at_values_is_compiled_up_to_there(device, compiled):
    net, x = make_net("basic", device), batch("basic", device)
    last = list(net.children())[-1]
    last.register_forward_pre_hook(lambda _, inputs: bool(inputs[0].sum() > 0) and None)
    revmodels.compile_ahead(net, x)
    assert compiled
    assert launch._compiler is None


def test_a_net_that_takes_too_long_is_compiled_in_part(device, monkeypatch):
    found = []
    monkeypatch.setattr(launch, "_compile", lambda *what: found.append(what))
    monkeypatch.setattr(launch, "_SECONDS", 0.0)
    net, x = make_net("basic", device, 1), batch("basic", device)
    revmodels.compile_ahead(net, x)
    assert not found
    step(net, x)


def test_without_kernels_there_is_nothing_to_do(device, compiled):
    net = revmodels.set_fused(make_net("basic", device), False)
    revmodels.compile_ahead(net, batch("basic", device))
    assert not compiled


def test_threads_compile_each_kind_once(monkeypatch, device):
    found = []
    monkeypatch.setattr(launch, "_compile", lambda kernel, types, *_: found.append((kernel, types)))
    net, x = make_net("basic", device, 3), batch("basic", device)
    revmodels.compile_ahead(net, x)
    kernels = [kernel.__name__ for kernel, _ in found]
    assert "convolve" in kernels
    assert "matrix_gradient" in kernels
    assert all(not isinstance(kind, torch.Tensor) for _, types in found for kind in types)
    # More blocks are no more kinds.
    count = len(found)
    found.clear()
    revmodels.compile_ahead(make_net("basic", device, 5), x)
    assert len(found) == count


def test_a_step_after_it_compiles_nothing(device, monkeypatch):
    if device.type != "cuda":
        pytest.skip("compiling needs --device cuda")
    monkeypatch.setattr(launch, "_SECONDS", 100.0)  # with other tests at work the step takes longer
    net, x = make_net("bottleneck", device), batch("bottleneck", device)
    revmodels.compile_ahead(net, x)

    def count():
        modules = (passes.kernels, conv_passes.kernels)
        jitted = [k for m in modules for k in vars(m).values() if hasattr(k, "device_caches")]
        return sum(len(cache[0]) for k in jitted for cache in k.device_caches.values())

    before = count()
    step(net, x)
    assert before
    assert count() == before
