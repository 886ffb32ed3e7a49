"""One gradient for each parameter that a branch uses, however often it does.

The node of a reversing chain returns one for each run of a branch. Plain autograd adds up those of
all uses in the order in which it comes to them, which rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revcore.arguments import Arguments
from revcore.snapshot import containers_of
from revcore.turns import TURN


def gathered_arguments(kwargs: Arguments) -> Arguments:
    """Replaces the tensors that require a gradient by views."""
    return {name: _view(v) if isinstance(v, Tensor) else v for name, v in kwargs.items()}


@contextmanager
def gathered_parameters(branch: nn.Module) -> Iterator[None]:
    """Lets a branch hold views of its parameters, in which their gradients meet first.

    In a compiled module they do so anyway.
    """
    modules = [*branch.modules()]
    if any(map(_is_compiled, modules)):
        yield
        return
    with TURN:
        places = [p for module in modules for p in (module._parameters, *containers_of(module))]
        plain = [p for p in branch.parameters() if type(p) in (Tensor, nn.Parameter)]
        views = {id(parameter): _view(parameter) for parameter in plain}
        back = {id(views[id(parameter)]): parameter for parameter in plain}
        _exchange(places, views)
        try:
            yield
        finally:
            _exchange(places, back)


def _view(x: Tensor) -> Tensor:
    # Sparse and nested tensors have no views.
    plain = x.layout is torch.strided and not x.is_nested
    return x.view_as(x) if x.requires_grad and plain else x


def _exchange(places: list[Any], others: Mapping[int, Tensor]) -> None:
    for place in places:
        for name, value in [*(place.items() if isinstance(place, dict) else enumerate(place))]:
            if id(value) in others:
                place[name] = others[id(value)]


def _is_compiled(module: nn.Module) -> bool:
    return (
        module._compiled_call_impl is not None
        or type(module).__name__ == "OptimizedModule"
        or isinstance(module, torch.jit.ScriptModule)
    )
