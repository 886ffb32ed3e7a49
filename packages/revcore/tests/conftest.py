"""Options and fixtures of all tests."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the tests run on")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = True
    # The tensors are so small that threads only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()
