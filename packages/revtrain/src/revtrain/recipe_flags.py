"""The recipe's keys as flags of the command line, made from its fields so that none is missing."""

from __future__ import annotations

from dataclasses import asdict, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter
from docstring_parser import parse_from_object

from revtrain.config import TrainConfig
from revtrain.recipe import Recipe


def _make_flags() -> Any:
    """Makes a class with a field for each of the recipe's that the configuration lacks."""
    types = get_type_hints(Recipe)
    texts = {text.arg_name: text.description for text in parse_from_object(Recipe).params}
    present = {field.name for field in fields(TrainConfig)}
    flags: list[Any] = []
    for name in (field.name for field in fields(Recipe) if field.name not in present):
        negative = f"--no-{name.replace('_', '-')}" if types[name] is bool else ()
        parameter = Parameter(help=texts[name], negative=negative, consume_multiple=True)
        # A flag that is not given leaves the recipe's value.
        flags.append((name, Annotated[types[name] | None, parameter], None))
    made = make_dataclass("RecipeFlags", flags, frozen=True, kw_only=True)
    made.__module__ = __name__  # or cyclopts takes it for a class of Python's own
    return made


if TYPE_CHECKING:
    RecipeFlags = Any
else:
    RecipeFlags = _make_flags()


def given(flags: RecipeFlags | None) -> dict[str, Any]:
    """Returns the flags that were given, by the recipe's key."""
    values = {} if flags is None else asdict(flags)
    return {key: value for key, value in values.items() if value is not None}
