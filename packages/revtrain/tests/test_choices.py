"""What people expect before a run: lists, a dry run, every key as a flag, the largest batch."""

import dataclasses
import json

import pytest
import torch
from tiny import TINY, as_flags

import revdata
import revmodels
import revtrain
from revtrain.batch_size import find_batch_size, largest_that_runs


def test_list_names_all_there_is(command):
    status, out, err = command("list")
    assert (status, err) == (0, "")
    words = out.split()
    for name in (*revmodels.list_models(), *revdata.list_datasets(), *revtrain.list_recipes()):
        assert name in words
    assert "573,994" in words  # parameters of revnet38
    assert max(map(len, out.splitlines())) <= 80


def test_a_dry_run_tells_what_the_run_then_does(command, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = command("train", *as_flags(TINY), "--dry-run", "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    plan = revtrain.dry_run(revtrain.TrainConfig(**TINY, out=tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
    assert f"{plan.parameters:,} parameters" in out
    assert "14 steps in 2 epochs of 1,442 images" in out
    summary = plain.summary
    assert (plan.parameters, plan.steps, plan.epochs) == (
        summary["parameters"],
        summary["steps"],
        summary["epochs"],
    )


def test_a_dry_run_measures_the_memory_of_the_mode_and_the_batch():
    options = {**TINY, "blocks": (8, 8, 8), "channels": (8, 8, 8, 8)}

    def kept(**more):
        plan = revtrain.dry_run(revtrain.TrainConfig(**{**options, **more}))
        assert plan.activation_bytes <= plan.peak_activation_bytes < plan.peak_memory_bytes
        return plan.activation_bytes

    reversed_ = kept()
    assert kept(stored=True) > 3 * reversed_
    assert kept(recompute=True) < reversed_ / 2
    assert kept(batch_size=100) == pytest.approx(reversed_ / 2, rel=0.1)


def test_a_dry_run_says_what_is_kept(command):
    for options, words in (
        ({}, "reversed"),
        ({"recompute": True}, "reversed, recomputed between the chains"),
        ({"stored": True}, "stored"),
        ({"model": "resnet32"}, "stored"),
    ):
        status, out, _ = command("train", *as_flags({**TINY, **options}), "--dry-run")
        assert status == 0
        (line,) = (line for line in out.splitlines() if "activations" in line)
        assert line.split(maxsplit=1)[1].rstrip() == words


def test_an_ordinary_network_has_nothing_to_recompute(command, tmp_path):
    words = as_flags({**TINY, "model": "resnet32", "recompute": True})
    status, _, err = command("train", *words, "--out", tmp_path / "run")
    assert (status, "model (='resnet32') is none" in err) == (2, True)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_a_run_refuses(command, train, tmp_path):
    train(epochs=1)
    words = ["train", *as_flags(TINY), "--out", tmp_path / "run", "--dry-run"]
    status, _, err = command(*words)
    assert (status, "holds a run already" in err) == (2, True)
    status, _, err = command(*words, "--fresh", "--num-classes", "3")
    assert (status, err.startswith("error: num_classes (=3)")) == (2, True)
    assert command(*words, "--fresh")[0] == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_dry_run_downloads_nothing(command, monkeypatch, tmp_path):
    monkeypatch.delenv("REVDATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, _, err = command("train", "--data", "cifar10", "--dry-run", "--cpu", "--download")
    assert status == 2
    assert "allow the download (--download)" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", dataclasses.fields(revtrain.Recipe), ids=lambda f: f.name)
def test_every_key_of_a_recipe_is_a_flag(command, monkeypatch, field):
    values = {
        "batch_size": 64,
        "lr": 0.7,
        "schedule": "steps",
        "epochs": 3,
        "steps": 31,
        "milestones": (0.25, 0.5),
        "gamma": 0.3,
        "warmup": 0.6,
        "momentum": 0.4,
        "nesterov": False,
        "weight_decay": 0.01,
        "decay": "all",
        "label_smoothing": 0.2,
        "augment": True,
        "cutout": 7,
    }
    value = values[field.name]
    seen = []

    def stop(config):
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr("revtrain.commands.Trainer", stop)
    command("train", "--recipe", "digits", *as_flags({field.name: value}))
    recipe, own = seen[0].resolved_recipe, revtrain.load_recipe("digits")
    assert getattr(recipe, field.name) == value != getattr(own, field.name)
    others = {"epochs"} if field.name == "steps" else set()
    for other in dataclasses.fields(revtrain.Recipe):
        if other.name not in {field.name, *others}:
            assert getattr(recipe, other.name) == getattr(own, other.name)
    assert (recipe.steps is None) != (recipe.epochs is None)
    python = revtrain.TrainConfig(recipe="digits", overrides={field.name: value})
    assert python.resolved_recipe == recipe


def test_a_flag_of_the_recipe_changes_the_run_and_is_recorded(command, tmp_path):
    words = [*as_flags({**TINY, "epochs": 1}), "--momentum", "0.5", "--no-nesterov"]
    assert command("train", *words, "--out", tmp_path / "run")[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["recipe"]["momentum"], config["recipe"]["nesterov"]) == (0.5, False)


def test_help_explains_the_keys_of_the_recipe(command):
    _, out, _ = command("train", "--help")
    for field in dataclasses.fields(revtrain.Recipe):
        assert f"--{field.name.replace('_', '-')}" in out
    assert "Coefficient of the L2 penalty" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"momemtum": 0.5}, "did you mean 'momentum'"),
        ({"momentum": 2}, r"momentum \(=2\) must be less than 1"),
        ({"epochs": 1, "steps": 1}, "exactly one"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        revtrain.TrainConfig(overrides=overrides)


@pytest.mark.parametrize(("limit", "found"), [(1000, 1000), (999, 500), (70, 62), (1, 1)])
def test_the_largest_batch_is_the_first_that_does_not_run_out_of_memory(limit, found):
    tried = []

    def train(batch_size):
        tried.append(batch_size)
        if batch_size > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    assert largest_that_runs(train, 1000) == found == tried[-1]
    assert tried == sorted(tried, reverse=True)


def test_other_errors_than_memory_are_not_taken_for_it():
    def fail(_):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        largest_that_runs(fail, 8)


def test_where_nothing_fits_it_says_so():
    def fail(_):
        raise RuntimeError("CUDA out of memory.")

    with pytest.raises(ValueError, match="not even a batch of one"):
        largest_that_runs(fail, 8)


def test_find_batch_needs_a_gpu(command):
    status, out, err = command("find-batch", "--cpu")
    assert (status, out) == (2, "")
    assert "on a GPU alone" in err


def test_find_batch_takes_real_steps(monkeypatch):
    """On the CPU, whose real limit nobody wants to meet: the step itself says where it is."""
    monkeypatch.setattr("revtrain.batch_size._without_limit", lambda _: False)
    sizes = []

    def limited(x, _, **_options):
        sizes.append(len(x))
        if len(x) > 20:
            raise RuntimeError("CUDA out of memory.")
        return x.sum()

    monkeypatch.setattr("torch.nn.functional.cross_entropy", limited)
    config = revtrain.TrainConfig(**TINY)
    assert find_batch_size(config, largest=64) == 16
    assert sizes == [64, 32, 16]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory with a limit")
def test_find_batch_on_a_gpu(command):
    status, out, _ = command("find-batch", "--largest", "64")
    assert (status, out.startswith("64 images fit")) == (0, True)


def test_tensorboard_gets_the_metrics(train):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    result = train(log_with=("tensorboard",))
    events = event_accumulator.EventAccumulator(str(result.run_folder / "logs" / "revtrain"))
    events.Reload()
    for key in ("train_loss", "test_accuracy"):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        written = [(record["step"], record[key]) for record in result.metrics]
        assert [step for step, _ in logged] == [step for step, _ in written]
        for (_, value), (_, expected) in zip(logged, written, strict=True):
            assert value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [("TensorBord", "did you mean 'tensorboard'"), ("wandb", "pip install wandb")],
)
def test_trackers_that_cannot_be_are_refused_before_training(
    command, tmp_path, monkeypatch, name, message
):
    monkeypatch.setattr("revtrain.tracking.get_available_trackers", lambda: ["tensorboard"])
    words = [*as_flags(TINY), "--log-with", name, "--out", tmp_path / "run"]
    status, _, err = command("train", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mirror_is_asked_where_files_are_missing(command, tmp_path, monkeypatch):
    monkeypatch.setenv("REVDATA_DIR", str(tmp_path / "data"))
    words = ["train", "--data", "cifar10", "--cpu", "--mirror", tmp_path / "mirror"]
    status, _, err = command(*words, "--out", tmp_path / "run")
    assert status == 2
    assert f"cannot download file://{tmp_path}/mirror/cifar-10-python.tar.gz" in err
    assert "name a mirror (--mirror)" in err
    status, _, err = command(*words, "--no-download")
    assert "allow the download (--download)" in err
