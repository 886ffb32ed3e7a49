"""Training learns, repeats itself, and leaves whole files behind."""

import json
import stat

import pytest
import torch
from safetensors.torch import load_model
from tiny import TINY

import revmodels
import revtrain
from revtrain.plots import plot_curve


def curve(result):
    return [(record["train_loss"], record["test_loss"]) for record in result.metrics]


def test_training_learns_and_evaluate_repeats_its_accuracy(train):
    result = train(epochs=10, lr=0.3)
    assert result.summary["test_accuracy"] > 0.8
    again = revtrain.evaluate(result.run_folder)
    assert again.accuracy == result.summary["test_accuracy"]
    assert again.loss == result.summary["test_loss"]
    assert (again.data, again.split, again.images) == ("digits", "test", 355)


def test_reversing_and_stored_give_the_same_loss_curve(train, plain):
    stored = train(stored=True)
    torch.testing.assert_close(curve(plain), curve(stored), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}], ids=str)
def test_recomputing_changes_no_bit(train, options):
    options = {**options, "epochs": 1}
    kept, recomputed = train(out="kept", **options), train(out="new", recompute=True, **options)
    assert curve(kept) == curve(recomputed)
    weights = [(run.run_folder / "model.safetensors").read_bytes() for run in (kept, recomputed)]
    assert weights[0] == weights[1]
    config = json.loads((recomputed.run_folder / "config.json").read_text())
    assert config["config"]["recompute"]


def test_a_seed_gives_the_same_run_and_another_seed_another(train, plain):
    again, other = train(out="again"), train(out="other", seed=1)
    assert curve(plain) == curve(again)
    assert (plain.run_folder / "model.safetensors").read_bytes() == (
        again.run_folder / "model.safetensors"
    ).read_bytes()
    assert curve(plain) != curve(other)


@pytest.mark.usefixtures("pictures")
def test_the_run_folder_tells_all(train):
    result = train()
    folder = result.run_folder
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["data"] == "digits"
    assert config["config"]["blocks"] == [2, 2, 2]
    assert config["recipe"]["batch_size"] == 200
    assert config["versions"]["torch"] == torch.__version__
    assert config["hardware"]["device"] == "cpu"
    assert config["hardware"]["processes"] == 1
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.metrics
    assert [record["epoch"] for record in result.metrics] == [1, 2]
    assert [record["step"] for record in result.metrics] == [7, 14]
    for record in result.metrics:
        assert 0 < record["test_accuracy"] < 1
        assert record["seconds"] > 0
        assert record["images_per_second"] == pytest.approx(1400 / record["seconds"])
        assert record["peak_memory_bytes"] > 1e6
    assert json.loads((folder / "summary.json").read_text()) == result.summary
    assert result.summary["steps"] == config["steps"] == 14
    assert (folder / "curve.svg").read_text().startswith("<?xml")
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    hidden = [file.name for file in folder.iterdir() if file.name.startswith(".")]
    assert hidden == [".lock"]  # which stays; nothing is half written
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (folder / "config.json").stat().st_mode
    )


def test_the_same_curve_is_the_same_file(tmp_path):
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    records = [{"epoch": epoch, **dict.fromkeys(names, 1 / epoch)} for epoch in (1, 2)]
    for name in ("one", "other"):
        plot_curve(records, "test", [tmp_path / f"{name}.svg", tmp_path / f"{name}.png"])
    for kind in ("svg", "png"):
        one, other = (tmp_path / f"{name}.{kind}" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_weights_load_without_revtrain(train):
    result = train(blocks=None, channels=None, epochs=1, batch_size=1400)
    net = revmodels.create_model("revnet38", num_classes=10, in_channels=1)
    load_model(net, result.run_folder / "model.safetensors")
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_steps_may_end_amid_an_epoch(train, tmp_path):
    recipe = tmp_path / "short.toml"
    recipe.write_text("batch_size = 200\nlr = 0.1\nschedule = 'steps'\nsteps = 9")
    result = train(recipe=str(recipe), epochs=None)
    assert [record["step"] for record in result.metrics] == [7, 9]
    assert result.summary["steps"] == 9


@pytest.mark.usefixtures("pictures")
def test_val_never_sees_the_test_images(train, monkeypatch):
    seen = []
    load = revtrain.data.revdata.load

    def spy(name, split, **options):
        seen.append(split)
        return load(name, split, **options)

    monkeypatch.setattr("revtrain.data.revdata.load", spy)
    result = train(val=True)
    again = revtrain.evaluate(result.run_folder)
    assert set(seen) == {"fit", "val"}
    assert again.split == "val"
    assert again.accuracy == result.summary["val_accuracy"]
    assert "test_accuracy" not in result.summary


@pytest.mark.parametrize(
    "options",
    [
        {"loader": "torch"},
        {"mixed_precision": "bf16"},
        {"model": "resnet32"},
        {"model": "revnet164"},
        {"num_classes": 12},
        {"recipe": "paper", "lr": 0.05},
    ],
    ids=str,
)
def test_other_choices_train_and_evaluate_too(train, options):
    result = train(**options)
    losses = [record["train_loss"] for record in result.metrics]
    assert losses[1] < losses[0]
    again = revtrain.evaluate(result.run_folder)
    assert again.accuracy == result.summary["test_accuracy"]


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory):
    """A run of one epoch in bfloat16, of which each test says on which device it was."""
    out = tmp_path_factory.mktemp("half") / "run"
    options = {**TINY, "blocks": (1, 1, 1), "epochs": 1, "mixed_precision": "bf16"}
    return revtrain.train(revtrain.TrainConfig(**options, out=out)).run_folder


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [("cpu", None, "bf16"), ("cuda", None, "no"), ("cuda", "bf16", "bf16"), ("cpu", "no", "no")],
)
def test_evaluation_of_a_gpu_run_on_a_cpu(half_precision, monkeypatch, device, asked, expected):
    """In half precision most CPUs take half an hour for what takes them a minute in float32."""
    file = half_precision / "config.json"
    config = json.loads(file.read_text())
    config["hardware"]["device"] = device
    file.write_text(json.dumps(config))
    found = []
    make = revtrain.evaluation.make_accelerator
    monkeypatch.setattr(
        "revtrain.evaluation.make_accelerator",
        lambda **options: found.append(options) or make(**options),
    )
    revtrain.evaluate(half_precision, cpu=True, mixed_precision=asked)
    assert found == [{"cpu": True, "mixed_precision": expected}]


def test_both_loaders_train_alike(train, plain):
    """Without augmentation they make the same batches."""
    workers = train(loader="torch")
    torch.testing.assert_close(curve(plain), curve(workers), rtol=1e-3, atol=1e-4)


def test_precision_does_not_leak_into_the_next_run(train):
    short = {"blocks": (1, 1, 1), "epochs": 1}
    train(out="bf16", mixed_precision="bf16", **short)
    next_ = train(out="next", **short)
    config = json.loads((next_.run_folder / "config.json").read_text())
    assert config["hardware"]["mixed_precision"] == "no"


def test_a_loss_that_is_no_number_ends_the_run(train, tmp_path):
    with pytest.raises(
        revtrain.NonFiniteLossError, match=r"at step 2, on rank 0: .* module .* lower"
    ):
        train(lr=1e30, epochs=3)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_fresh_replaces_a_run_and_nothing_else(train, tmp_path):
    train()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "events").write_text("of the old run")
    with pytest.raises(FileExistsError, match="--fresh"):
        train()
    train(fresh=True, epochs=1)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "logs").exists()


def test_cifar10(train, cifar10):
    tiny = {"blocks": (1, 1, 1), "channels": (4, 4, 4, 8), "epochs": 1, "batch_size": 500}
    result = train(**{**tiny, **cifar10})
    again = revtrain.evaluate(result.run_folder)
    assert again.accuracy == result.summary["test_accuracy"]
    if len(str(again.images)) > 2:  # the real one
        assert again.images == 10_000
        assert again.accuracy > 0.2


def test_the_command_line_has_the_fields_of_the_configuration():
    assert set(TINY) <= set(revtrain.TrainConfig.__dataclass_fields__)
