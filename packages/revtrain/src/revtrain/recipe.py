"""A recipe: every hyperparameter of a training run, as a small TOML file that anyone can read."""

from __future__ import annotations

import difflib
import math
import sys
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of stochastic gradient descent, checked when they are set.

    Raises:
        ValueError: A value is of another type or out of range; the message names the key.

    Example:
        >>> load_recipe("paper").batch_size
        100
        >>> Recipe(batch_size=100, lr=-1.0, schedule="one-cycle", epochs=2)
        Traceback (most recent call last):
        ...
        ValueError: lr (=-1.0) must be greater than 0
    """

    batch_size: int
    """Images per step, over all processes together."""
    lr: float
    """Learning rate; the peak of it where the schedule is a cycle."""
    schedule: Literal["steps", "one-cycle"]
    """`steps` multiplies the rate by `gamma` at each milestone; `one-cycle` lets it rise and fall
    along half cosines (Smith and Topin 2017)."""
    epochs: int | None = None
    """Length of the run in passes over the training images. Either this or `steps`."""
    steps: int | None = None
    """Length of the run in optimizer steps. Either this or `epochs`."""
    milestones: tuple[float, ...] = ()
    """Where `steps` changes the rate, in fractions of the run, so that a shorter run keeps the
    shape."""
    gamma: float = 0.1
    """What `steps` multiplies the rate by."""
    warmup: float = 0.3
    """Fraction of the run in which `one-cycle` rises."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's."""
    weight_decay: float = 0.0
    """Coefficient of the L2 penalty."""
    decay: Literal["all", "weights"] = "all"
    """What is decayed: all parameters, or only weights of layers (neither biases nor the scales of
    normalizations)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    augment: bool = True
    """Whether to crop (and flip) the training images at random, as far as that suits the data."""
    cutout: int = 0
    """Side, in pixels, of a square that is erased in each training image (DeVries and Taylor 2017);
    0 for none."""

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, (list, tuple)):
            raise ValueError(f"milestones (={self.milestones!r}) must be a list of numbers")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        self._check_types()
        _check("batch_size", self.batch_size, least=1)
        _check("lr", self.lr, above=0)
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs (={self.epochs}) and steps (={self.steps}): give exactly one of them"
            )
        _check("epochs", self.epochs, least=1)
        _check("steps", self.steps, least=1)
        for milestone in self.milestones:
            _check("milestones", milestone, above=0, below=1)
        _check("gamma", self.gamma, above=0)
        _check("warmup", self.warmup, above=0, below=1)
        _check("momentum", self.momentum, least=0, below=1)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov (=True) needs a momentum greater than 0")
        _check("weight_decay", self.weight_decay, least=0)
        _check("label_smoothing", self.label_smoothing, least=0, below=1)
        _check("cutout", self.cutout, least=0)

    def _check_types(self) -> None:
        for names, types, what in (
            (("batch_size", "cutout"), int, "a whole number"),
            (("epochs", "steps"), (int, type(None)), "a whole number"),
            (("nesterov", "augment"), bool, "true or false"),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, types) or (types is not bool and isinstance(value, bool)):
                    raise ValueError(f"{name} (={value!r}) must be {what}")
        for name, choices in (
            ("schedule", ("steps", "one-cycle")),
            ("decay", ("all", "weights")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} (={getattr(self, name)!r}) must be one of {', '.join(choices)}"
                )


def _check(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Refuses a number out of range; None is a value that was not given."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} (={value!r}) must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} (={value}) must be finite")
    if least is not None and not value >= least:
        raise ValueError(f"{name} (={value}) must be at least {least}")
    if above is not None and not value > above:
        raise ValueError(f"{name} (={value}) must be greater than {above}")
    if below is not None and not value < below:
        raise ValueError(f"{name} (={value}) must be less than {below}")


def list_recipes() -> list[str]:
    """Returns the names of the recipes that come with the package.

    Example:
        >>> list_recipes()
        ['cifar10', 'cifar100', 'digits', 'fast', 'paper']
    """
    folder = resources.files("revtrain") / "recipes"
    return sorted(file.name[: -len(".toml")] for file in folder.iterdir() if _is_toml(file.name))


def _is_toml(name: str) -> bool:
    return name.endswith(".toml")


def load_recipe(name: str) -> Recipe:
    """Reads a recipe.

    Args:
        name: One of `list_recipes`, or the path of a TOML file (a name that ends in `.toml`).

    Returns:
        The recipe.

    Raises:
        ValueError: There is no recipe of this name, or its file has an unknown key, lacks one, or
            has a value out of range.
        FileNotFoundError: There is no file at this path.

    Example:
        >>> recipe = load_recipe("paper")
        >>> recipe.lr, recipe.steps, recipe.milestones
        (0.1, 80000, (0.5, 0.75))
    """
    if _is_toml(name):
        if not Path(name).is_file():
            raise FileNotFoundError(f"recipe {name!r}: there is no such file")
        content = Path(name).read_bytes()
    elif name in list_recipes():
        file = resources.files("revtrain") / "recipes" / f"{name}.toml"
        content = file.read_bytes()
    else:
        known = list_recipes()
        raise ValueError(
            f"unknown recipe {name!r}: {_nearest(name, known)}known are {', '.join(known)}, "
            "and any file whose name ends in .toml"
        )
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"recipe {name!r}: {error}") from error


def _parse(content: bytes) -> Recipe:
    values = tomllib.loads(content.decode("utf-8"))
    for key in values:
        refuse_unknown_key(key)
    for field in fields(Recipe):
        if field.default is MISSING and field.name not in values:
            raise ValueError(f"the key {field.name!r} is missing")
    return Recipe(**values)


def refuse_unknown_key(key: str) -> None:
    """Raises if a recipe has no such key.

    Raises:
        ValueError: It names the nearest that there is.
    """
    known = [field.name for field in fields(Recipe)]
    if key not in known:
        raise ValueError(f"unknown key {key!r}: {_nearest(key, known)}known: {', '.join(known)}")


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
