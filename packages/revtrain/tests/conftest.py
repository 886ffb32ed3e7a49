"""Ways to run: from Python, from the command line, on CIFAR-10."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, write_small_cifar10

import revtrain
from revtrain.cli import main
from revtrain.plots import plot_curve


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    # What a shell starts in the background ignores Ctrl-C, and so would these tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _no_pictures():
    # To draw the curve of a tiny run takes as long as the run.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_curve", "plot_memory"):
            patch.setattr(f"revtrain.finish.{name}", lambda *_: None)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Runs in this process draw their curves, as those in processes of their own always do."""
    monkeypatch.setattr("revtrain.finish.plot_curve", plot_curve)


@pytest.fixture
def train(tmp_path):
    """Trains the tiny net with other options, by the Python API."""

    def run(out="run", **options):
        return revtrain.train(revtrain.TrainConfig(**{**TINY, "out": tmp_path / out, **options}))

    return run


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The run of the tiny net as it is, which others are compared to and no test changes."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return revtrain.train(revtrain.TrainConfig(**TINY, out=out))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process; returns exit status, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["revtrain", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def small_cifar10(tmp_path_factory):
    """A folder with a small data set of CIFAR-10's format; its checksums are not the official."""
    root = tmp_path_factory.mktemp("small")
    write_small_cifar10(root)
    return root


@pytest.fixture(scope="session")
def cifar10(small_cifar10):
    """Options for CIFAR-10: the real one where REVDATA_DIR has it, else a small one."""
    real = os.environ.get("REVDATA_DIR")
    if real and (Path(real) / "cifar-10-batches-py").is_dir():
        return {"data": "cifar10", "data_dir": Path(real)}
    return {"data": "cifar10", "data_dir": small_cifar10, "verify": False, "batch_size": 50}
