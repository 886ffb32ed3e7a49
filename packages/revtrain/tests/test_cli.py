"""The command line as it is typed: in a process of its own, and by its words."""

import json

import pytest
from tiny import TINY, as_flags, launch

import revdata
import revmodels
import revtrain


def test_the_main_job_then_evaluate(tmp_path):
    out = tmp_path / "run"
    options = as_flags({**TINY, "memory": True, "batch_size": 100})
    trained = launch("-m", "revtrain", "train", *options, "--out", out)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((out / "summary.json").read_text())
    accuracy = f"{summary['test_accuracy']:.2%}"
    assert f"test accuracy {accuracy}, time per step" in trained.stdout
    assert "from 14 to 194 layers" in trained.stdout.lower()
    record = json.loads((out / "memory.json").read_text())
    assert record["batch"] == [100, 1, 8, 8]
    assert [depth["blocks"] for depth in record["depths"]] == [1, 2, 4, 8, 16]
    last = record["depths"][-1]
    assert last["stored"]["activation_bytes"] > 5 * last["reversing"]["activation_bytes"]
    assert (out / "memory.svg").read_text().startswith("<?xml")
    assert (out / "memory.png").read_bytes().startswith(b"\x89PNG")
    # Without a terminal there is a line for each epoch and no bar.
    assert [line[:9] for line in trained.stderr.splitlines() if line] == ["epoch 1/2", "epoch 2/2"]
    command = json.loads((out / "config.json").read_text())["command"]
    assert command.startswith("python -m revtrain train --data digits")

    evaluated = launch("-m", "revtrain", "evaluate", out)
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"digits test accuracy {accuracy} (355 images" in evaluated.stdout


def test_the_command_does_what_python_does(command, plain, tmp_path):
    status, _, _ = command("train", *as_flags(TINY), "--out", tmp_path / "run")
    assert status == 0
    one, other = (folder / "model.safetensors" for folder in (tmp_path / "run", plain.run_folder))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--help",),
        ("train", "--help"),
        ("evaluate", "--help"),
        ("list", "--help"),
        ("find-batch", "--help"),
    ],
)
def test_help(command, words):
    status, out, err = command(*words)
    assert (status, err) == (0, "")
    assert "Usage: revtrain" in out


def test_help_explains_every_choice(command):
    _, out, _ = command("train", "--help")
    for name in (*revmodels.list_models(), *revdata.list_datasets(), *revtrain.list_recipes()):
        assert name in out
    # What overrides holds are flags of their own.
    for field in set(revtrain.TrainConfig.__dataclass_fields__) - {"overrides"}:
        assert f"--{field.replace('_', '-')}" in out


def test_version(command):
    status, out, _ = command("--version")
    assert status == 0
    assert out.strip()


def test_help_waits_for_no_torch():
    code = (
        "import sys, revtrain.cli; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    )
    assert launch("-c", code).returncode == 0


def test_training_and_evaluating_wait_for_no_torchvision():
    code = "import sys, revtrain.commands; sys.exit('torchvision' in sys.modules)"
    assert launch("-c", code).returncode == 0


def test_the_package_has_the_names_that_it_lists():
    for name in revtrain.__all__:
        assert getattr(revtrain, name).__module__.startswith("revtrain.")
    assert set(revtrain.__all__) <= set(dir(revtrain))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = revtrain.trian


@pytest.mark.parametrize(("command_name", "hint"), [("train", True), ("list", False)])
def test_ctrl_c_outside_of_the_loop(command, monkeypatch, command_name, hint):
    """While it imports, reads data or writes results: no traceback, and the shell's status."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("revtrain.commands.Trainer", interrupt)
    monkeypatch.setattr("revtrain.listing.print_lists", interrupt)
    status, out, err = command(command_name)
    assert (status, out) == (130, "")
    assert err.startswith("interrupted")
    assert ("--resume" in err) is hint
    assert err.count("\n") == 1
