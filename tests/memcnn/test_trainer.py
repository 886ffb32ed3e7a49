"""MemCNN's own training script trains its own RevNet, with ours for its couplings.

Run with the plugin: PYTHONPATH=tests/memcnn python -m pytest -p shim tests/memcnn/test_trainer.py
"""

import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import revcore.memcnn as ours
import revmodels

memcnn = pytest.importorskip("memcnn")
if memcnn.InvertibleModuleWrapper is not ours.InvertibleModuleWrapper:
    pytest.skip("needs the plugin", allow_module_level=True)

from memcnn.data.sampling import NSamplesRandomSampler  # noqa: E402
from memcnn.experiment.manager import ExperimentManager  # noqa: E402
from memcnn.models.resnet import ResNet, RevBasicBlock  # noqa: E402
from memcnn.trainers.classification import train  # noqa: E402
from memcnn.utils.loss import CrossEntropyLossTF  # noqa: E402


def test_its_trainer_trains_its_revnet_which_loads_here(tmp_path):
    torch.manual_seed(0)
    net = ResNet(
        RevBasicBlock,
        [3, 3, 3],
        num_classes=10,
        channels_per_layer=[32, 32, 64, 112],
        strides=[1, 1, 2, 2],
        init_max_pool=False,
        init_kernel_size=3,
        batch_norm_fix=False,
        implementation=0,
    )
    blocks = [part for part in net.modules() if isinstance(part, ours.InvertibleModuleWrapper)]
    assert len(blocks) == 7  # of nine, two of which change the shape
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    manager = ExperimentManager(str(tmp_path / "run"), net, optimizer)
    manager.make_dirs()
    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    # Six steps of the same eight images.
    loaders = [
        DataLoader(images, batch_size=8, sampler=NSamplesRandomSampler(images, nsamples))
        for nsamples in (6 * 8, 8)
    ]
    train(manager, *loaders, 0, disp_iter=1, save_iter=6, valid_iter=6, loss=CrossEntropyLossTF())
    logged = json.loads((tmp_path / "run" / "log" / "scalars.json").read_text())
    losses = [entry[2] for entry in logged["train_loss"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0]

    twin = revmodels.create_model("revnet38", num_classes=10)
    state = torch.load(tmp_path / "run" / "state" / "model" / "6.pt")
    twin.load_state_dict(revmodels.from_memcnn(state))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), net.eval()(x))
