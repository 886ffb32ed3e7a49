"""What there is to choose from, as tables for the terminal."""

from __future__ import annotations

import torch
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table

import revdata
import revmodels
from revtrain.net import NetSpec
from revtrain.recipe import list_recipes, load_recipe


def print_lists() -> None:
    """Prints the networks, the data sets and the recipes, on stdout."""
    Console(highlight=False).print(Group(_models(), _data(), _recipes()))


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in columns:
        table.add_column(column)
    return table


def _models() -> Table:
    names = ("name", "reverses", "layers", "block", "per stage", "channels", "parameters")
    table = _table("Networks (--model), with 10 classes", *names)
    for name in revmodels.list_models():
        spec = NetSpec.of(name, num_classes=10, in_channels=3)
        with torch.device("meta"):  # counts, but makes no weights
            parameters = sum(parameter.numel() for parameter in spec.build().parameters())
        kind = spec.architecture
        table.add_row(
            name,
            "yes" if kind.reversible else "no",
            str(kind.layers),
            kind.block,
            _numbers(kind.blocks),
            _numbers(kind.channels),
            f"{parameters:,}",
        )
    return table


def _data() -> Table:
    table = _table("Data sets (--data)", "name", "training", "test", "image", "classes")
    for name in revdata.list_datasets():
        info = revdata.describe(name)
        images = (f"{info.train_images:,}", f"{info.test_images:,}")
        table.add_row(name, *images, "x".join(map(str, info.shape)), str(info.num_classes))
    return table


def _recipes() -> Table:
    names = ("name", "length", "batch", "learning rate", "weight decay", "momentum")
    table = _table("Recipes (--recipe), or a TOML file of your own", *names)
    for name in list_recipes():
        recipe = load_recipe(name)
        length = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.epochs} epochs"
        table.add_row(
            name,
            length,
            str(recipe.batch_size),
            f"{recipe.lr:g}, {recipe.schedule}",
            f"{recipe.weight_decay:g}, {recipe.decay}",
            f"{recipe.momentum:g}" + (", Nesterov" if recipe.nesterov else ""),
        )
    return table


def _numbers(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))
