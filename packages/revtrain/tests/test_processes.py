"""Two processes train as one does with the same global batch."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY, TORCHRUN, as_flags, launch

import revdata
from revtrain.data import make_loader


def curve(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    keys = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "step")
    return [[json.loads(line)[key] for key in keys] for line in lines]


def test_two_processes_train_to_the_loss_curve_of_one(train, tmp_path):
    out = tmp_path / "two"
    words = ("-m", "revtrain", "train", *as_flags({**TINY, "cpu": False})[:-1])
    words = [word for word in (*words, "--out", out) if word != "--no-cpu"]
    two = launch(*TORCHRUN, *words, "--no-memory", ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert json.loads((out / "config.json").read_text())["hardware"]["processes"] == 2
    assert two.stdout.count("test accuracy") == 1
    train(out="one")
    torch.testing.assert_close(
        torch.tensor(curve(out)), torch.tensor(curve(tmp_path / "one")), rtol=1e-4, atol=1e-4
    )

    evaluated = launch(*TORCHRUN, "-m", "revtrain", "evaluate", out, "--cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    accuracy = json.loads((out / "summary.json").read_text())["test_accuracy"]
    assert evaluated.stdout.count(f"accuracy {accuracy:.2%}") == 1


def test_any_number_of_processes_can_evaluate():
    images, seen = revdata.load("digits", "test"), []
    for rank in range(3):
        process = SimpleNamespace(num_processes=3, process_index=rank, device=torch.device("cpu"))
        seen += [labels for _, labels in make_loader(images, 500, process)]
    assert torch.cat(seen).sort().values.equal(images.labels.sort().values)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerators do not get lost")
def test_lost_processes_are_an_error(tmp_path):
    words = [word for word in as_flags(TINY) if word != "--cpu"]
    done = launch(*TORCHRUN, "-m", "revtrain", "train", *words, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert "WORLD_SIZE=2" in done.stderr
    assert "ACCELERATE_USE_CPU=true" in done.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_accelerate_never_started_are_an_error(tmp_path):
    done = launch(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "revtrain"),
        *("train", *as_flags(TINY), "--out", tmp_path / "run"),
    )
    assert done.returncode != 0
    assert "was asked for several processes, but started one" in done.stderr
    assert not (tmp_path / "run").exists()
