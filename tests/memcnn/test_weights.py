"""What MemCNN saved loads here and computes the same, bit for bit; its example runs unchanged.

MemCNN has to be installed: `python -m nox -s memcnn`.
"""

import contextlib
import importlib.metadata
import io
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import revcore.memcnn as ours
import revmodels

memcnn = pytest.importorskip("memcnn")
resnet = pytest.importorskip("memcnn.models.resnet")
EXPERIMENTS = json.loads(
    (Path(memcnn.__file__).parent / "config" / "experiments.json").read_text(encoding="utf-8")
)


def parameters_of(name):
    """Those of one of the six nets: its entry, over that of its base."""
    entry = EXPERIMENTS[name]
    base = parameters_of(entry["base"]) if "base" in entry else {}
    return base | entry["model_params"]


def disturb(net):
    """Gives every weight and statistic a value that no other has, as training would."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.01, 2.0)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", revmodels.list_models())
def test_all_six_nets(name, classes, tmp_path):
    arguments = parameters_of(name)
    block = getattr(resnet, arguments.pop("block").rpartition(".")[2])
    theirs = resnet.ResNet(block, num_classes=classes, **arguments)
    disturb(theirs)
    torch.save(theirs.state_dict(), tmp_path / "80000.pt")

    net = revmodels.create_model(name, num_classes=classes)
    net.load_state_dict(revmodels.from_memcnn(torch.load(tmp_path / "80000.pt")))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), theirs.eval()(x.clone()))


CASES = {
    "additive": ("additive", None, 1),
    "naive": ("affine", "AffineAdapterNaive", 1),
    "sigmoid": ("affine", "AffineAdapterSigmoid", 2),
}


def build(library, case):
    coupling, adapter, factor = CASES[case]
    branch = nn.Sequential(nn.Conv2d(3, 3 * factor, 3, padding=1), nn.BatchNorm2d(3 * factor))
    return nn.Sequential(
        *(
            library.InvertibleModuleWrapper(
                library.create_coupling(
                    branch, coupling=coupling, adapter=adapter and getattr(library, adapter)
                )
            )
            for _ in range(2)
        )
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("source", "target"), [(memcnn, ours), (ours, memcnn)])
def test_state_dicts_go_both_ways(case, source, target):
    saved, loaded = build(source, case), build(target, case)
    disturb(saved)
    assert list(saved.state_dict()) == list(loaded.state_dict())
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        assert torch.equal(saved.eval()(x.clone()), loaded.eval()(x.clone()))


def test_an_optimizer_goes_on():
    saved, loaded = build(memcnn, "additive"), build(ours, "additive")
    shapes = [[p.shape for p in net.parameters()] for net in (saved, loaded)]
    names = [[name for name, _ in net.named_parameters()] for net in (saved, loaded)]
    assert shapes[0] == shapes[1]
    assert names[0] == names[1]


def test_the_example_of_its_readme_runs_with_another_import():
    readme = importlib.metadata.metadata("memcnn").get_payload()
    readme = readme or importlib.metadata.metadata("memcnn")["Description"]
    (code,) = re.findall(r"\.\. code:: python\n\n((?:    .*\n|\s*\n)+)", readme)
    code = "\n".join(line[4:] for line in code.splitlines())
    assert code.count("import memcnn") == 1
    code = code.replace("import memcnn", "import revcore.memcnn as memcnn")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README", "exec"), {})
