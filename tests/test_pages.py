"""What the tables of the guides say of networks, data and recipes is what the code does."""

from pathlib import Path

import revdata
import revtrain
from revmodels import create_model, list_models

ROOT = Path(__file__).parents[1]


def rows(path):
    """The rows of all tables of a page, by their first cell."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_networks_are_those_of_the_code():
    table = rows("docs/packages/revmodels.md")
    for name in list_models():
        count = sum(parameter.numel() for parameter in create_model(name).parameters())
        assert table[name][-1] == f"{count:,}", name


def test_splits_are_those_of_the_code():
    table, info = rows("docs/packages/revdata.md"), revdata.describe("cifar10")
    held_out = info.train_images // 10
    cifar = {"train": info.train_images, "test": info.test_images, "val": held_out}
    cifar["fit"] = info.train_images - held_out
    for split, count in cifar.items():
        _, of_cifar, of_digits = table[split]
        assert of_cifar == f"{count:,}"
        assert of_digits == f"{len(revdata.load('digits', split)):,}"


def test_recipes_are_those_of_the_code():
    table = rows("docs/packages/revtrain.md")
    for name in revtrain.list_recipes():
        recipe, (batch, length, rate, *_) = revtrain.load_recipe(name), table[name]
        assert batch == str(recipe.batch_size)
        assert length in {f"{recipe.epochs} epochs", f"{recipe.steps or 0:,} steps"}
        assert str(recipe.lr) in rate
