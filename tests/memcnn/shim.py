"""A pytest plugin that runs MemCNN's own tests on `revcore.memcnn`.

    PYTHONPATH=tests/memcnn python -m pytest -p shim --pyargs memcnn.models.tests

Ours stands in for MemCNN's three modules of couplings; its nets, which are built of them, its
trainer, which trains those, and its tests are its own. What cannot pass is marked with the reason,
and has to fail. With `--left-alone` the one helper that asks whether a caller's input was emptied
is exchanged for one that asks whether it was left alone.
"""

import importlib
import importlib.util
import os
import sys
import types

import pytest
import torch.utils.checkpoint
import torchvision

import revcore.memcnn as ours

EMPTIED = "MemCNN empties the caller's input and refills it in backward; ours leaves it alone"
NOT_A_LEAF = "MemCNN writes .grad of tensors that are no leaves; ours needs retain_grad(), as torch"


DOWNLOAD = ("test_cuda_amp", "test_train", "test_train_with_nan_loss")
WITHOUT_THEIR_FILE = ("test_run_experiment", "test_train_networks")


def stand_in(name, **more):
    module = types.ModuleType(name)
    vars(module).update({each: getattr(ours, each) for each in ours.__all__}, **more)
    sys.modules[name] = module


SPEC = importlib.util.find_spec("memcnn")
stand_in("memcnn", __path__=list(SPEC.submodule_search_locations))
# MemCNN has copies of torch's two functions.
stand_in(
    "memcnn.models.revop",
    get_device_states=torch.utils.checkpoint.get_device_states,
    set_device_states=torch.utils.checkpoint.set_device_states,
)
# Its names before version 0.3.
stand_in("memcnn.models.additive", AdditiveBlock=ours.AdditiveCoupling)
stand_in("memcnn.models.affine", AffineBlock=ours.AffineCoupling)


class LocalCIFAR10(torchvision.datasets.CIFAR10):
    """CIFAR-10 from a folder that holds it already."""

    def __init__(self, root, download, **kwargs):
        super().__init__(os.environ["REVDATA_DIR"], **kwargs)


def pytest_addoption(parser):
    parser.addoption("--left-alone", action="store_true")


def pytest_configure(config):
    if os.environ.get("REVDATA_DIR"):
        torchvision.datasets.CIFAR10 = torchvision.datasets.cifar.CIFAR10 = LocalCIFAR10
    if config.getoption("left_alone"):
        tests = importlib.import_module("memcnn.models.tests.test_revop")
        tests.is_memory_cleared = left_alone


def left_alone(tensor, _, shape):
    return tensor.shape == shape and tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def pytest_collection_modifyitems(config, items):
    for item in items:
        test, values = item.originalname, getattr(item, "callspec", None)
        values = values.params if values else {}
        emptied = test == "test_invertible_module_wrapper_disabled_versus_enabled" or (
            test == "test_invertible_module_wrapper_fwd_bwd"
            and not (values["keep_input"] and values["keep_input_inverse"])
        )
        if emptied and not config.getoption("left_alone"):
            item.add_marker(pytest.mark.xfail(reason=EMPTIED, raises=AssertionError, strict=True))
        if test == "test_chained_invertible_module_wrapper_shared_fwd_and_bwd_train_passes":
            item.add_marker(
                pytest.mark.xfail(reason=NOT_A_LEAF, raises=AssertionError, strict=True)
            )
        if test in DOWNLOAD and not os.environ.get("REVDATA_DIR"):
            item.add_marker(pytest.mark.skip(reason="downloads CIFAR-10; set REVDATA_DIR"))
        if test in WITHOUT_THEIR_FILE:
            item.add_marker(pytest.mark.skip(reason="MemCNN's release lacks the file it reads"))
