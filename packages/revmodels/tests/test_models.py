"""The nets have the published sizes, and a RevNet learns the same whether it reverses or stores."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import revcore
import revmodels

# Parameters with 10 classes: section 5 of Gomez et al. (2017) gives 0.46, 1.73, 1.70, 0.57 and 1.85
# million to two decimals, and 1.98 for RevNet-164; these are the exact counts.
PARAMETERS = {
    "resnet32": 466_906,
    "resnet110": 1_730_714,
    "resnet164": 1_704_154,
    "revnet38": 573_994,
    "revnet110": 1_854_890,
    "revnet164": 1_983_786,
}
REVNETS = sorted(name for name in PARAMETERS if name.startswith("rev"))


def test_every_name_is_listed():
    assert revmodels.list_models() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    net = revmodels.create_model(name, num_classes=10)
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_architecture_can_be_changed_and_built(name):
    architecture = revmodels.get_architecture(name)
    assert architecture.layers == int(name[-3:] if name[-3].isdigit() else name[-2:])
    assert architecture.reversible == name.startswith("rev")
    small = replace(architecture, blocks=(1, 2, 1), channels=(4, 4, 8, 8))
    assert small.build(3)(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (4, 4), (17, 9)])
@pytest.mark.parametrize("name", ["resnet32", "revnet38"])
def test_any_classes_channels_and_image_size(name, size):
    net = revmodels.create_model(name, num_classes=7, in_channels=1)
    assert net(torch.randn(2, 1, *size)).shape == (2, 7)


def small(block="basic", blocks=(2, 3, 2), channels=(8, 8, 16, 12), **kwargs):
    torch.manual_seed(0)
    return revmodels.RevNet(block, blocks, channels, 5, **kwargs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_reversing_computes_what_storing_computes(block, recompute):
    reversing = small(block, recompute=recompute).double()
    stored = small(block, reversing=False).double()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    logits = []
    for net in (reversing, stored):
        logits.append(net(x))
        F.cross_entropy(logits[-1], y).backward()
    assert torch.equal(*logits)
    assert reversing.state_dict().keys() == stored.state_dict().keys()
    for ours, plain in zip(reversing.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)
    for ours, plain in zip(reversing.buffers(), stored.buffers(), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": True}, {"reversing": False}],
    ids=["reversed", "recomputed", "stored"],
)
def test_a_whole_net_compiles(options):
    net = small(blocks=(1, 2), channels=(8, 8, 16), **options)
    x = torch.randn(2, 3, 8, 8)
    plain = net(x)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, plain)
    compiled.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_the_loss_curve_is_the_same():
    x, y = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 5
    curves = []
    for reversing in (True, False):
        net = small(reversing=reversing).double()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        curve = []
        for _ in range(15):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < curves[0][0] / 2


@pytest.mark.parametrize("name", REVNETS)
def test_switching_by_argument(name):
    for enabled in (True, False):
        net = revmodels.create_model(name, reversing=enabled, recompute=enabled)
        assert net.recompute == enabled
        chains = [m for m in net.modules() if isinstance(m, revcore.ReversibleSequential)]
        assert chains
        assert all(chain.reversing == enabled for chain in chains)


def activations(blocks, **kwargs):
    torch.manual_seed(0)
    net = revmodels.RevNet("basic", (blocks,) * 3, (8, 8, 16, 32), **kwargs)
    x = torch.randn(4, 3, 16, 16)
    with revcore.track_memory() as memory:
        loss = net(x).sum()
        after_forward = memory.live_bytes
        del loss
    return after_forward


def test_activation_memory_does_not_grow_with_depth():
    # Beyond what is stored outside the chains, each net keeps one counter of every BatchNorm.
    shallow, deep = (activations(blocks, reversing=True) for blocks in (2, 12))
    assert deep == shallow
    shallow, deep = (activations(blocks, reversing=False) for blocks in (2, 12))
    assert deep > 4 * shallow


def test_what_is_recomputed_keeps_the_outputs_of_the_chains():
    streams = 4 * 4 * (8 * 16 * 16 + 16 * 8 * 8 + 32 * 4 * 4)  # float32, a batch of 4
    loss = 4
    kept = [activations(blocks, reversing=True, recompute=True) for blocks in (2, 12)]
    assert kept == [streams + loss] * 2
    assert activations(2, reversing=True) > 2 * kept[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_run_where_parts_are_recomputed(recompute):
    net, seen = small(recompute=recompute), []
    for name, module in net.named_modules():
        if type(module) is not torch.nn.Sequential:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    net(torch.randn(2, 3, 8, 8))
    assert {"stages.0", "stages.1.transition", "stages.2.chain", "norm", "stem.0"} <= {*seen}


def test_streams_stay_float32_under_autocast():
    net = small()
    seen = []
    for module in net.modules():
        if isinstance(module, revcore.ReversibleSequential):
            module.register_forward_hook(lambda _m, args, out: seen.extend((args[0], out)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(torch.randn(2, 3, 8, 8))
    assert logits.dtype == torch.bfloat16
    assert len(seen) == 6
    assert {tensor.dtype for tensor in seen} == {torch.float32}


def test_copies_are_independent():
    net = small()
    other = copy.deepcopy(net)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net.eval()(x), other.eval()(x))
    other(x).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown model 'revnet83'.*'revnet38'.*resnet110"):
        revmodels.create_model("revnet83")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": "wide"}, "block='wide' is unknown"),
        ({"blocks": (2, 2)}, r"channels=\(8, 8, 16, 32\) must have one number .* blocks=\(2, 2\)"),
        ({"blocks": (2, 0, 2)}, r"blocks must be positive integers, got \(2, 0, 2\)"),
        ({"num_classes": 0}, r"num_classes must be positive"),
        ({"in_channels": -1}, r"in_channels must be positive"),
        ({"num_classes": 2.5}, r"num_classes must be positive integers, got \(2.5,\)"),
        ({"channels": (8.0, 8, 8, 8)}, r"channels must be positive integers, got \(8.0, 8, 8, 8\)"),
        ({"blocks": 2}, r"blocks=2 must be a sequence of integers, one for each stage"),
    ],
)
@pytest.mark.parametrize("network", [revmodels.ResNet, revmodels.RevNet])
def test_arguments_out_of_range(network, arguments, message):
    good = {"block": "basic", "blocks": (2, 2, 2), "channels": (8, 8, 16, 32)}
    with pytest.raises((TypeError, ValueError), match=message):
        network(**(good | arguments))


def test_odd_channels_cannot_be_split():
    with pytest.raises(ValueError, match=r"channels must be even, to be split .* got 15"):
        revmodels.RevNet("basic", (2, 2, 2), (8, 8, 15, 32))


# MemCNN's own names; `python -m nox -s memcnn` compares all of them with a real MemCNN.
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("resnet164", "conv1.weight", "stem.0.weight"),
        ("resnet164", "bn_final.running_var", "norm.running_var"),
        ("resnet164", "fc.bias", "classifier.bias"),
        ("resnet164", "layer1.0.downsample.1.weight", "stages.0.0.shortcut.1.weight"),
        ("resnet164", "layer3.4.bottleneck_sub.conv3.weight", "stages.2.4.branch.convs.2.weight"),
        ("revnet38", "layer2.0.basicblock_sub.bn1.bias", "stages.1.transition.branch.norms.0.bias"),
        ("revnet38", "layer1.0.revblock._fn.Fm.conv1.weight", "stages.0.chain.0.f.convs.0.weight"),
        ("revnet38", "layer2.1.revblock._fn.Gm.bn2.weight", "stages.1.chain.0.g.norms.1.weight"),
    ],
)
def test_names_of_memcnn(name, theirs, ours):
    saved = {"layer2.0.downsample.0.weight": 0, "layer2.1.revblock._fn.Fm.bn1.weight": 1}
    saved = (saved if name.startswith("rev") else {}) | {theirs: 2}
    renamed = revmodels.from_memcnn(saved)
    assert renamed[ours] == 2
    assert renamed.keys() <= revmodels.create_model(name).state_dict().keys()


@pytest.mark.parametrize("name", ["module.conv1.weight", "layer1.0.revblock.Fm.w", "fc"])
def test_names_that_memcnn_does_not_have(name):
    with pytest.raises(ValueError, match=f"'{name}' is not a weight of MemCNN's ResNet"):
        revmodels.from_memcnn({name: torch.zeros(1)})
