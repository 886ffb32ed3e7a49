"""Options and fixtures of all tests."""

import importlib
import os
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import torch

from revmodels.fused import load


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the tests run on")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        # Triton's interpreter runs the kernels; it is asked for before Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        with suppress(ImportError):  # Triton may be missing
            # The interpreter takes long for each program, whatever the size of its tile.
            importlib.import_module("revmodels.passes").CHANNELS = 64
            importlib.import_module("revmodels.conv_passes").COLUMNS = 512


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    # The tensors are so small that threads only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels of convolutions, which multiply as exactly as float32 can."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # TF32 rounds to 11 bits
    found = load("conv_passes", device.type)
    assert found is not None
    return found


@pytest.fixture
def products(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """Counts what the kernels compute; True stands for what is added to a stream."""
    found: dict[str, list[bool]] = {"convolve": [], "gradients": []}

    def counted(name: str, function: Any) -> Any:
        def count(*args: Any, base: Any = None, **kwargs: Any) -> Any:
            found[name].append(base is not None)
            return function(*args, base=base, **kwargs)

        return count

    for name in found:
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    return found
