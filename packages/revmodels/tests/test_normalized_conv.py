"""BatchNorm, ReLU and a convolution by our kernels are what torch makes of the three."""

import copy

import pytest
import torch
import torch.nn.functional as F
from batches import batch, relative_error
from torch import nn

import revmodels
from revmodels import fused
from revmodels.branches import make_branch
from revmodels.moments import Moments
from revmodels.normalized_conv import norm_relu_conv

passes, norm_passes = (
    pytest.importorskip(name, reason="there is no Triton", exc_type=ImportError)
    for name in ("revmodels.conv_passes", "revmodels.passes")
)
pytest.importorskip("numpy", reason="Triton's interpreter needs it")

pytestmark = pytest.mark.usefixtures("kernels")

# Powers of two and not, one tile of columns and several, rows that end inside of a tile.
SHAPES = [
    ((3, 16, 9, 7), 64, 1),
    ((2, 64, 8, 8), 16, 1),
    ((2, 8, 4, 4), 24, 1),
    ((5, 72, 6, 6), 104, 1),
    ((2, 24, 5, 5), 200, 1),
    ((1, 8, 2, 3), 8, 1),
    ((3, 16, 9, 7), 16, 3),
    ((2, 32, 8, 8), 64, 3),
    ((2, 8, 4, 5), 24, 3),
    ((5, 56, 6, 6), 40, 3),
    ((1, 8, 2, 3), 8, 3),
]


def make_layers(channels, outputs, device, size=1):
    norm = nn.BatchNorm2d(channels)
    conv = nn.Conv2d(channels, outputs, size, padding=size // 2, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layers = nn.Sequential(norm, conv).to(device, memory_format=torch.channels_last)
    return revmodels.set_fused(layers, True)


def plain(layers, x):
    norm, conv = layers
    return conv(F.relu(norm(x)))


def is_fused(y):
    return type(y.grad_fn).__name__ == "_NormalizedConvBackward"


def compare(layers, x, tolerance):
    """Compares outputs, gradients and buffers with those of float64."""
    exact, x_exact = copy.deepcopy(layers).double(), x.detach().double().requires_grad_()
    y, expected = norm_relu_conv(*layers, x), plain(exact, x_exact)
    assert is_fused(y)
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(y)
    inputs = (x, *layers.parameters())
    found = torch.autograd.grad(y, inputs, grad)
    right = torch.autograd.grad(expected, (x_exact, *exact.parameters()), grad.double())
    assert relative_error(y, expected) < tolerance
    for ours, theirs, of in zip(found, right, inputs, strict=True):
        assert ours.dtype == of.dtype
        assert relative_error(ours, theirs) < 2 * tolerance
    for ours, theirs in zip(layers.buffers(), exact.buffers(), strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize(("shape", "outputs", "size"), SHAPES)
def test_values_gradients_and_buffers(device, shape, outputs, size):
    compare(make_layers(shape[1], outputs, device, size), batch(*shape, device=device), 2e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_sums_over_many_parts_of_many_tiles(device, size, monkeypatch):
    monkeypatch.setattr(passes, "PROGRAMS", 6)
    for tiles in (passes.ACTIVATION, passes.MATRIX):
        monkeypatch.setitem(tiles, 64, ((64, 4, 3, 36), (64, 4, 3, 36)))
    monkeypatch.setattr(passes, "PARTS", 2)
    assert passes._parts(5 * 11 * 11, 64, 3, 1) == (4, 3)
    compare(make_layers(40, 48, device, size), batch(5, 40, 11, 11, device=device), 2e-6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, dtype, size):
    layers, x = make_layers(48, 32, device, size), batch(4, 48, 5, 5, device=device, dtype=dtype)
    twin = copy.deepcopy(layers)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, expected = norm_relu_conv(*layers, x), plain(twin, x)
    assert is_fused(y)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert relative_error(y, expected) < 2.0**-7
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, *layers.parameters()), grad)
    right = torch.autograd.grad(expected, (x, *twin.parameters()), grad)
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < 2.0**-6


@pytest.mark.parametrize(("shape", "outputs", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_what_is_written(device, shape, outputs, size, dtype):
    """The statistics are those of the result, also if its mean is large beside its deviation."""
    norm, conv = make_layers(shape[1], outputs, device, size)
    x = batch(*shape, device=device).detach()
    by = norm_passes.Normalization(
        *norm_passes.statistics(x, norm.eps), norm.weight, norm.bias.detach() + 99
    )
    moments = Moments()
    y = passes.convolve(x, by, conv.weight.detach().abs(), dtype=dtype, moments=moments)
    running = (torch.zeros(outputs), torch.ones(outputs), torch.tensor(0))
    running = tuple(buffer.to(device) for buffer in running)
    mean, inverse = norm_passes.statistics(y, 1e-5, running, 1.0, moments)
    variance, center = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, center) < 1e-6
    assert relative_error(inverse, (variance + 1e-5).rsqrt()) < 1e-4
    count = y.numel() // outputs
    assert torch.equal(running[0], mean)
    assert relative_error(running[1], variance * count / (count - 1)) < 1e-4
    assert running[2] == 1


@pytest.mark.parametrize(
    ("kind", "training"), [("basic", True), ("bottleneck", True), ("basic", False)]
)
def test_a_branch_reads_its_input_alone_for_statistics(device, monkeypatch, kind, training):
    looked_at = []
    sum_up = norm_passes._sum_up
    monkeypatch.setattr(norm_passes, "_sum_up", lambda x: looked_at.append(x) or sum_up(x))
    branch = make_branch(kind, 32, 32 if kind == "basic" else 8).train(training)
    branch.to(device, memory_format=torch.channels_last)
    x = batch(2, 32, 4, 4, device=device).detach()
    with torch.no_grad():
        revmodels.set_fused(branch, True)(x)
    assert [seen is x for seen in looked_at] == [True] * training


def test_weights_that_were_cast_before(device):
    layers, x = make_layers(16, 8, device), batch(2, 16, 4, 4, device=device)
    layers[1].to(torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = norm_relu_conv(*layers, x)
    assert is_fused(y)
    y.sum().backward()
    assert layers[1].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_bits_each_time(device, size):
    layers, x = make_layers(64, 32, device, size), batch(2, 64, 8, 8, device=device)
    runs = []
    for _ in range(2):
        y = norm_relu_conv(*layers, x)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, *layers.parameters()))))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("size", [1, 3])
def test_second_derivatives(device, size):
    layers, x = make_layers(4, 6, device, size), batch(3, 4, 3, 3, device=device)
    penalties = []
    for function in (lambda x: norm_relu_conv(*layers, x), lambda x: plain(layers, x)):
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), (x, *layers.parameters())))
    for ours, theirs in zip(*penalties, strict=True):
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("size", [1, 3])
def test_frozen(device, size):
    layers, x = (
        make_layers(4, 6, device, size).requires_grad_(False),
        batch(3, 4, 3, 3, device=device),
    )
    norm_relu_conv(*layers, x).square().sum().backward()
    (expected,) = torch.autograd.grad(plain(layers, x).square().sum(), x)
    assert relative_error(x.grad, expected) < 1e-5


def test_evaluation_without_gradients(device, products):
    layers, x = make_layers(16, 8, device), batch(4, 16, 6, 6, device=device)
    norm_relu_conv(*layers, x)  # gives it statistics
    layers.eval()
    products["convolve"].clear()
    with torch.no_grad():
        assert relative_error(norm_relu_conv(*layers, x), plain(layers, x)) < 1e-6
    assert products["convolve"] == [False]


def with_hook(layers):
    layers[1].register_forward_hook(lambda *_: None)
    return layers


def with_conv(outputs=16, **kwargs):
    def change(layers):
        conv = nn.Conv2d(16, outputs, **kwargs)
        return nn.Sequential(layers[0], conv.to(layers[1].weight.device))

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: revmodels.set_fused(layers, False),
        lambda layers: layers.eval(),
        with_hook,
        with_conv(kernel_size=1),  # has a bias
        with_conv(kernel_size=1, stride=2, bias=False),
        with_conv(kernel_size=3, bias=False),
        with_conv(kernel_size=5, padding=2, bias=False),
        with_conv(kernel_size=3, padding=1, stride=2, bias=False),
        with_conv(kernel_size=3, padding=2, dilation=2, bias=False),
        with_conv(kernel_size=3, padding=1, padding_mode="circular", bias=False),
        with_conv(kernel_size=1, padding=1, bias=False),
        with_conv(kernel_size=1, groups=2, bias=False),
        lambda layers: nn.Sequential(layers[0], nn.utils.parametrizations.weight_norm(layers[1])),
        with_conv(outputs=12, kernel_size=1, bias=False),
        with_conv(outputs=512, kernel_size=1, bias=False),
        with_conv(outputs=128, kernel_size=3, padding=1, bias=False),
    ],
)
def test_whatever_the_kernels_cannot_do_runs_as_it_is(device, products, change):
    layers, x = change(make_layers(16, 8, device)), batch(2, 16, 4, 4, device=device)
    twin = copy.deepcopy(layers)
    y = norm_relu_conv(*layers, x)
    assert not products["convolve"]
    assert relative_error(y, plain(twin, x)) < 1e-6


def test_channels_that_are_no_eights_run_as_they_are(device, products):
    layers, x = make_layers(12, 8, device), batch(2, 12, 4, 4, device=device)
    twin = copy.deepcopy(layers)
    assert relative_error(norm_relu_conv(*layers, x), plain(twin, x)) < 1e-6
    assert not products["convolve"]


def test_large_convolutions_of_half_precision_run_as_they_are(device, monkeypatch):
    layers, x = make_layers(24, 8, device, 3), batch(2, 24, 4, 4, device=device)
    narrow, less = make_layers(16, 8, device, 3), batch(2, 16, 4, 4, device=device)
    one_by_one = make_layers(24, 8, device)
    monkeypatch.setattr(passes, "MOST_PRODUCTS", x.numel() * 8 - 1)
    assert is_fused(norm_relu_conv(*layers, x))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert not is_fused(norm_relu_conv(*layers, x))
        assert is_fused(norm_relu_conv(*one_by_one, x))
        monkeypatch.setattr(passes, "MOST_PRODUCTS", 1)
        assert is_fused(norm_relu_conv(*narrow, less))
        monkeypatch.setattr(passes, "MOST_PRODUCTS", x.numel() * 8)
        assert is_fused(norm_relu_conv(*layers, x))


def test_kernels_that_do_not_work_are_not_used(device, monkeypatch):
    monkeypatch.setattr(fused, "_loaded", {})
    convolve = passes.convolve
    monkeypatch.setattr(passes, "convolve", lambda *args, **kw: convolve(*args, **kw) * 1.1)
    layers, x = make_layers(16, 8, device), batch(2, 16, 4, 4, device=device)
    with pytest.warns(UserWarning, match="they give other results"):
        y = norm_relu_conv(*layers, x)
    assert not is_fused(y)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_to_a_grid(device, size, sign):
    norm, conv = make_layers(16, 24, device, size)
    nn.init.normal_(conv.weight, std=100)
    x = batch(2, 16, 5, 5, device=device).detach()
    zero, one = torch.zeros(16, device=device), torch.ones(16, device=device)
    by = norm_passes.Normalization(zero, one, norm.weight.detach(), norm.bias.detach())
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    t = passes.convolve(x, by, weight, dtype=torch.float32)
    base = torch.randint_like(t, -100, 100) / 4
    for bits in (1, 2, 14, 20):  # of which some make integers that float32 has no fractions of
        found = passes.convolve(x, by, weight, dtype=torch.float32, base=base, sign=sign, grid=bits)
        assert torch.equal(found, base + sign * torch.round(t * 2**bits) / 2**bits)
    # A tie goes to the even neighbor.
    norm.bias.data.zero_()
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.25, 3.75], device=device)
    conv.weight.data.zero_()
    conv.weight.data[:8, 0, size // 2, size // 2] = halves
    by = norm_passes.Normalization(zero, one, one, zero)
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    found = passes.convolve(
        torch.ones_like(x), by, weight, dtype=torch.float32, base=0 * base, sign=sign, grid=1
    )
    assert torch.equal(found[0, :8, 2, 2], sign * torch.round(2 * halves) / 2)
    found = passes.convolve(
        torch.ones_like(x), by, weight / 2, dtype=torch.float32, base=0 * base, sign=sign, grid=1
    )
    assert torch.equal(found[0, :8, 2, 2], sign * torch.round(halves) / 2)
