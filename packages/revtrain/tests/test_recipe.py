"""Recipes say what they are meant to say, and refuse what nobody can have meant."""

import pytest
import torch
from torch import nn

from revdata import list_datasets
from revtrain import Recipe, TrainConfig, list_recipes, load_recipe
from revtrain.optim import make_optimizer, make_scheduler

VALID = {"batch_size": 100, "lr": 0.1, "schedule": "one-cycle", "epochs": 2}


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_loads(name):
    assert isinstance(load_recipe(name), Recipe)


def rates(recipe, steps):
    """Learning rates of all steps of a run."""
    optimizer = make_optimizer(nn.Linear(2, 2), recipe)
    scheduler = make_scheduler(optimizer, recipe, steps)
    seen = []
    optimizer.step()  # one that a scheduler wants to have come first
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return torch.tensor(seen, dtype=torch.float64)


def test_paper_is_the_published_recipe():
    recipe = load_recipe("paper")
    assert (recipe.batch_size, recipe.steps, recipe.epochs) == (100, 80_000, None)
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, False, 2e-4)
    assert (recipe.decay, recipe.label_smoothing, recipe.augment) == ("all", 0.0, True)
    lr = rates(recipe, 80_000)
    torch.testing.assert_close(lr[:40_000], torch.full((40_000,), 0.1, dtype=lr.dtype))
    torch.testing.assert_close(lr[40_000:60_000], torch.full((20_000,), 0.01, dtype=lr.dtype))
    torch.testing.assert_close(lr[60_000:], torch.full((20_000,), 0.001, dtype=lr.dtype))


def test_one_cycle_rises_to_the_rate_and_falls_to_nothing():
    lr = rates(load_recipe("fast"), 1000)
    assert lr.argmax() == pytest.approx(300, abs=2)
    assert lr.max() == pytest.approx(0.3, rel=1e-4)
    assert lr[-1] < 1e-4 < lr[0] < 0.02
    assert (lr[:299].diff() > 0).all()
    assert (lr[301:].diff() < 0).all()


def test_fast_decays_weights_only():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    weights, others = make_optimizer(model, load_recipe("fast")).param_groups
    assert [p.ndim for p in weights["params"]] == [4]
    assert weights["weight_decay"] == 5e-4
    assert [p.ndim for p in others["params"]] == [1, 1, 1]
    assert others["weight_decay"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(=0\) must be at least 1"),
        ({"batch_size": 1.5}, r"batch_size \(=1.5\) must be a whole number"),
        ({"lr": 0}, r"lr \(=0\) must be greater than 0"),
        ({"lr": float("nan")}, r"lr \(=nan\)"),
        ({"lr": float("inf")}, r"lr \(=inf\) must be finite"),
        ({"lr": "high"}, r"lr \(='high'\) must be a number"),
        ({"schedule": "cosine"}, r"schedule \(='cosine'\) must be one of steps, one-cycle"),
        ({"epochs": 0}, r"epochs \(=0\)"),
        ({"steps": 10}, "exactly one"),
        ({"epochs": None}, "exactly one"),
        ({"milestones": [0.5, 2]}, r"milestones \(=2\) must be less than 1"),
        ({"warmup": 1.0}, r"warmup \(=1.0\)"),
        ({"momentum": 1}, r"momentum \(=1\)"),
        ({"momentum": 0, "nesterov": True}, "nesterov"),
        ({"nesterov": "yes"}, r"nesterov \(='yes'\) must be true or false"),
        ({"weight_decay": -1}, r"weight_decay \(=-1\)"),
        ({"decay": "some"}, r"decay \(='some'\)"),
        ({"label_smoothing": 1}, r"label_smoothing \(=1\)"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{**VALID, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size = 1\nlr = 1\nschedule = 'steps'\nepochs = 1\nlearning = 2", "key 'learning'"),
        ("batch_size = 1\nlr = 1\nschedule = 'steps'\nepoch = 1", "did you mean 'epochs'"),
        ("lr = 1\nschedule = 'steps'\nepochs = 1", "'batch_size' is missing"),
        ("lr = = 1", "mine.toml"),
        (b"lr = 1 # \xff".decode("latin-1"), "mine.toml': 'utf-8' codec"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        load_recipe(str(file))


def test_a_file_of_ones_own_is_a_recipe(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("batch_size = 10\nlr = 1\nschedule = 'steps'\nepochs = 3\nmilestones = [0.5]")
    config = TrainConfig(recipe=str(file))
    assert config.resolved_recipe == Recipe(
        batch_size=10, lr=1, schedule="steps", epochs=3, milestones=(0.5,)
    )
    assert config.run_folder.name == "digits-revnet38-mine-seed0"


def test_flags_override_the_recipe():
    recipe = TrainConfig(recipe="paper", epochs=3, batch_size=7, lr=0.5).resolved_recipe
    assert (recipe.epochs, recipe.steps, recipe.batch_size, recipe.lr) == (3, None, 7, 0.5)
    assert recipe.momentum == load_recipe("paper").momentum


@pytest.mark.parametrize("data", list_datasets())
def test_each_data_set_has_a_recipe_of_its_own_by_default(data):
    assert TrainConfig(data=data).recipe == data
    assert load_recipe(data).augment == (data != "digits")
