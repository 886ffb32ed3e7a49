"""BatchNorm and ReLU by our kernels are BatchNorm and ReLU, on the CPU by Triton's interpreter."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from batches import batch, relative_error
from torch import nn

import revcore
import revmodels
from revmodels import fused
from revmodels.batchnorm import batch_norm_relu
from revmodels.fused import load

passes = pytest.importorskip("revmodels.passes", reason="there is no Triton", exc_type=ImportError)
pytest.importorskip("numpy", reason="Triton's interpreter needs it")

# Powers of two and not, one tile of columns and several, batches that end inside of a tile.
SHAPES = [
    (4, 16, 9, 7),
    (3, 112, 5, 5),
    (2, 3, 4, 4),
    (4, 64, 8, 8),
    (2, 160, 3, 3),
    (2, 1, 2, 3),
]


@pytest.fixture(autouse=True)
def _fresh(device):
    passes._lay_out.cache_clear()
    assert load("passes", device.type) is passes
    yield
    passes._lay_out.cache_clear()


def make_norm(channels, device):
    norm = nn.BatchNorm2d(channels).to(device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return revmodels.set_fused(norm, True)


def plain(norm, x, *, relu=True):
    y = norm(x)
    return F.relu(y) if relu else y


def is_fused(y):
    return type(y.grad_fn).__name__ == "_NormalizeBackward"


def compare(norm, x, tolerance, *, relu=True):
    """Compares outputs, gradients and buffers with those of float64."""
    exact, x_exact = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    y, expected = batch_norm_relu(norm, x, relu=relu), plain(exact, x_exact, relu=relu)
    assert is_fused(y)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(y)
    inputs, exact_inputs = (x, *norm.parameters()), (x_exact, *exact.parameters())
    found = torch.autograd.grad(y, inputs, grad)
    right = torch.autograd.grad(expected, exact_inputs, grad.double())
    assert relative_error(y, expected) < tolerance
    for ours, theirs, of in zip(found, right, inputs, strict=True):
        assert ours.dtype == of.dtype
        assert relative_error(ours, theirs) < 2 * tolerance
    assert relative_error(norm.running_mean, exact.running_mean) < 1e-6
    assert relative_error(norm.running_var, exact.running_var) < 1e-6
    assert norm.num_batches_tracked == exact.num_batches_tracked == 1


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_gradients_and_buffers(device, shape, relu):
    x = batch(*shape, device=device)
    compare(make_norm(shape[1], device), x, 2e-6, relu=relu)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision_rounds_once(device, dtype, digits):
    compare(make_norm(48, device), batch(4, 48, 5, 5, device=device, dtype=dtype), 2.0**-digits)


@pytest.mark.parametrize("channels", [16, 48, 160])
def test_sums_over_many_parts_of_many_tiles(device, channels, monkeypatch):
    monkeypatch.setattr(passes, "PROGRAMS", 6)
    monkeypatch.setattr(passes, "PARTS", 4)
    monkeypatch.setattr(passes, "ROWS", 8)
    layout = passes._lay_out(5 * channels * 11 * 11, channels)
    assert layout.steps > 1
    assert layout.rows > passes.PARTS or channels == 160
    compare(make_norm(channels, device), batch(5, channels, 11, 11, device=device), 2e-6)


def test_a_large_mean_costs_no_precision(device):
    x = torch.randn(8, 16, 16, 16, device=device, dtype=torch.float64) * 0.1 + 1000
    x = x.float().to(memory_format=torch.channels_last)
    mean, inverse = passes.statistics(x, 1e-5)
    variance, center = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, center) < 1e-7
    assert (
        relative_error(inverse, (variance + 1e-5).rsqrt()) < 1e-4
    )  # a difference of squares has none left


def test_the_same_bits_each_time(device):
    x, norm = batch(8, 16, 16, 16, device=device), make_norm(16, device)
    runs = []
    for _ in range(2):
        y = batch_norm_relu(norm, x)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, *norm.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_stays_nan(device):
    x = batch(2, 16, 4, 4, device=device)
    with torch.no_grad():
        x[0, 3, 1, 1] = torch.nan
    y = batch_norm_relu(make_norm(16, device), x)
    assert y[:, 3].isnan().all()
    assert not y[:, :3].isnan().any()


def test_under_autocast_the_result_is_what_the_convolution_would_cast_it_to(device):
    x, norm = batch(4, 16, 6, 6, device=device), make_norm(16, device)
    full = batch_norm_relu(norm, x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        half = batch_norm_relu(norm, x)
        assert batch_norm_relu(norm, x, cast=False).dtype == torch.float32
    assert half.dtype == torch.bfloat16
    # The interpreter cuts digits off where a GPU rounds to nearest.
    step = 0.0 if device.type == "cuda" else 2.0**-7
    torch.testing.assert_close(half, full.bfloat16(), rtol=step, atol=0)
    grad = torch.randn_like(half)
    found = torch.autograd.grad(half, (x, *norm.parameters()), grad)
    right = torch.autograd.grad(full, (x, *norm.parameters()), grad.float())
    for ours, theirs in zip(found, right, strict=True):
        # A GPU adds up in another order where a gradient of 16 bits is read in wider pieces.
        assert relative_error(ours, theirs) < (1e-6 if device.type == "cuda" else 1e-30)


def test_second_derivatives(device):
    x, norm = batch(3, 4, 3, 3, device=device), make_norm(4, device)
    penalties = []
    for function in (batch_norm_relu, plain):
        y = function(norm, x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), (x, *norm.parameters())))
    for ours, theirs in zip(*penalties, strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_frozen_weights(device):
    x, norm = batch(3, 4, 3, 3, device=device), make_norm(4, device).requires_grad_(False)
    batch_norm_relu(norm, x).square().sum().backward()
    (expected,) = torch.autograd.grad(plain(norm, x).square().sum(), x)
    assert relative_error(x.grad, expected) < 1e-5
    assert norm.weight.grad is None


def hooked(norm):
    norm.register_forward_hook(lambda *_: None)
    return norm


def without(norm, **attributes):
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(
    "change",
    [
        lambda norm, x: (revmodels.set_fused(norm, False), x),
        lambda norm, x: (norm.eval(), x),
        lambda norm, x: (norm, x.contiguous()),
        lambda norm, x: (norm.double(), x.double()),
        lambda norm, x: (without(norm, momentum=None), x),
        lambda norm, x: (type(norm)(16, affine=False).to(x.device), x),
        lambda norm, x: (hooked(norm), x),
        lambda norm, x: (nn.Sequential(norm), x),
        lambda norm, x: (nn.InstanceNorm2d(norm.num_features).to(x.device), x),
    ],
)
def test_whatever_the_kernels_cannot_do_runs_as_it_is(device, change):
    norm, x = change(make_norm(16, device), batch(2, 16, 4, 4, device=device).detach())
    x = x.requires_grad_()
    twin = copy.deepcopy(norm)
    y = batch_norm_relu(norm, x)
    assert not is_fused(y)
    assert torch.equal(y, plain(twin, x))
    for ours, theirs in zip(norm.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("relu", [True, False])
def test_evaluation_without_gradients(device, relu, monkeypatch):
    norm, x = make_norm(16, device), batch(4, 16, 6, 6, device=device)
    batch_norm_relu(norm, x)  # gives it statistics
    norm.eval()
    normalized, before = [], [value.clone() for value in norm.buffers()]
    original = passes.normalize
    monkeypatch.setattr(
        passes, "normalize", lambda *args, **kw: normalized.append(1) or original(*args, **kw)
    )
    with torch.no_grad():
        y = batch_norm_relu(norm, x, relu=relu)
        assert relative_error(y, plain(norm, x, relu=relu)) < 1e-6
    assert normalized == [1]
    assert all(map(torch.equal, norm.buffers(), before))
    with torch.inference_mode():
        assert torch.equal(batch_norm_relu(norm, x, relu=relu), y)


def test_untracked_statistics(device):
    norm = nn.BatchNorm2d(16, track_running_stats=False).to(device)
    revmodels.set_fused(norm, True)
    x = batch(2, 16, 4, 4, device=device)
    y = batch_norm_relu(norm, x)
    assert is_fused(y)
    assert relative_error(y, plain(norm, x)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 8, 4, 4), (2, 16, 4)])
def test_errors_are_those_of_batch_normalization(device, shape):
    x = torch.randn(shape, device=device)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        make_norm(16, device)(x)
    with pytest.raises(type(expected.value)) as found:
        batch_norm_relu(make_norm(16, device), x)
    assert str(found.value) == str(expected.value)


def test_transforms_of_torch_func(device):
    norm = make_norm(16, device)
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = None
    x = batch(2, 16, 4, 4, device=device).detach()
    found = torch.func.grad(lambda x: batch_norm_relu(norm, x).square().sum())(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(batch_norm_relu(norm, x).square().sum(), x)
    assert relative_error(found, expected) < 1e-4


def test_a_compiler_sees_operations_of_torch(device):
    norm, x = make_norm(16, device), batch(2, 16, 4, 4, device=device)
    compiled = torch.compile(batch_norm_relu, backend="eager", fullgraph=True)
    y = compiled(norm, x)
    assert torch.equal(y, plain(norm, x))


def zeros_instead(x, *_, **__):
    return torch.zeros(x.shape[1]).to(x), torch.ones(x.shape[1]).to(x)


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        (lambda *_, **__: 1 / 0, "do not compile: division by zero"),
        (zeros_instead, "they give other results"),
    ],
)
def test_kernels_that_do_not_work_are_not_used(device, monkeypatch, statistics, reason):
    monkeypatch.setattr(fused, "_loaded", {})
    monkeypatch.setattr(passes, "statistics", statistics)
    norm, x = make_norm(16, device), batch(2, 16, 4, 4, device=device)
    with pytest.warns(UserWarning, match=reason):
        y = batch_norm_relu(norm, x)
    assert torch.equal(y, plain(norm, x))


def small_net(device, blocks=(2, 1), channels=(12, 12, 16), **kwargs):
    torch.manual_seed(0)
    net = revmodels.RevNet("basic", blocks, channels, 5, **kwargs)
    net.to(device, memory_format=torch.channels_last)
    return revmodels.set_fused(net, True)


def all_gradients(net):
    # In one piece, because some are zero up to rounding.
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_reversed_net_computes_what_a_stored_one_computes(device, autocast, monkeypatch):
    calls = []
    compute = passes.statistics
    monkeypatch.setattr(
        passes, "statistics", lambda *args, **kw: (calls.append(1), compute(*args, **kw))[1]
    )
    x = batch(4, 3, 4, 4, device=device).detach()
    nets, logits = [], []
    for reversing in (True, False):
        net = small_net(device, reversing=reversing)
        calls.clear()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            logits.append(net(x))
        F.cross_entropy(logits[-1].float(), torch.arange(4, device=device)).backward()
        # Once for each normalization: the repetition is given the statistics.
        assert len(calls) == sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        nets.append(net)
    assert torch.equal(*logits)
    for ours, theirs in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert relative_error(*map(all_gradients, nets)) < (0.05 if autocast else 1e-4)


def test_a_net_computes_what_it_computes_without_kernels(device, monkeypatch):
    # A convolution in TF32 makes of a last bit of its input one of ten.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fused, unfused = small_net(device), revmodels.set_fused(small_net(device), False)
    x, labels = batch(4, 3, 4, 4, device=device).detach(), torch.arange(4, device=device)
    for net in (fused, unfused):
        F.cross_entropy(net(x), labels).backward()
    for ours, theirs in zip(fused.buffers(), unfused.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert relative_error(all_gradients(fused), all_gradients(unfused)) < 1e-4


def test_copies_and_pickles_are_fused_too_and_state_dicts_are_the_same(device):
    net = small_net(device)
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for twin in twins:
        norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
        assert all(norm.fused for norm in norms)
    plain_net = revmodels.set_fused(copy.deepcopy(net), False)
    assert list(plain_net.state_dict()) == list(net.state_dict())
    x = batch(4, 3, 4, 4, device=device).detach()
    assert torch.equal(twins[0](x), net(x))
    assert not torch.equal(plain_net(x), net(x))  # the order of the sums differs


def test_in_a_cuda_graph(device):
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs CUDA")
    net = small_net(device, (2, 2, 2), (8, 8, 16, 12))  # no interpreter needs time for it
    twin, x = copy.deepcopy(net), batch(4, 3, 8, 8, device=device).detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        net(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net.zero_grad(set_to_none=True)
        net(x).sum().backward()
    graph.replay()
    for _ in range(2):
        twin.zero_grad(set_to_none=True)
        twin(x).sum().backward()
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_inside_of_a_chain_nothing_is_kept(device):
    """What remember keeps is a few numbers a channel, not activations."""
    x = batch(4, 8, 16, 16, device=device)
    kept = []
    for depth in (2, 6):
        branches = (revmodels.branches.make_branch("basic", 4, 4) for _ in range(2 * depth))
        blocks = [revcore.AdditiveCoupling(f, g) for f, g in zip(branches, branches, strict=True)]
        chain = revcore.ReversibleSequential(*blocks)
        chain.to(device, memory_format=torch.channels_last)
        revmodels.set_fused(chain, True)
        with revcore.track_memory() as memory:
            loss = chain(x).sum()
            kept.append(memory.live_bytes)
            del loss
    # For each of 4 blocks more: four normalizations, mean and deviation of 4 channels.
    assert kept[1] - kept[0] <= 4 * 4 * 512 * 2
