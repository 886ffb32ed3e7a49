"""A chain to be asked about: the branches, the input, and what is observed of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.adapters import Adapter, Plain
from conformance.plain import Pair

Maker = Callable[[int, int], nn.Module]


def mlp(width: int, out: int) -> nn.Module:
    """A branch that needs nothing but its parameters."""
    return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, out))


def normed(width: int, out: int) -> nn.Module:
    """A branch with statistics."""
    return nn.Sequential(nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, out))


def conv(width: int, out: int) -> nn.Module:
    """A branch for images, with an operation in place."""
    return nn.Sequential(
        nn.GroupNorm(2, width), nn.ReLU(inplace=True), nn.Conv2d(width, out, 3, padding=1)
    )


class Attention(nn.Module):
    """A branch for tokens."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = self.out(self.attention(x, x, x, need_weights=False)[0])
        return y


class Dropout(nn.Module):
    """Dropout that notes its masks while asked to, and can be told to use them again."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Tensor] | None = []
        self.given: Iterator[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.given is not None:
            return x * next(self.given)
        mask = F.dropout(torch.ones_like(x), 0.5)
        if self.noted is not None:
            self.noted.append(mask)
        return x * mask


def dropping(width: int, out: int) -> nn.Module:
    """A branch that draws random numbers."""
    return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), Dropout(), nn.Linear(7, out))


def loss_of(y: Tensor) -> Tensor:
    """A loss whose gradient is different at every element."""
    weight = torch.linspace(0.5, 1.5, max(y.numel(), 1), dtype=y.dtype, device=y.device)
    return (y.sin() * weight[: y.numel()].view_as(y)).sum()


class Subject:
    """A chain of an adapter, its branches and its input, the same for every adapter.

    Args:
        adapter: Builds the chain.
        device: Where it lives.
        branch: Makes a branch from the widths of its input and output.
        shape: The shape of one stream.
        depth: The number of blocks.
        split_dim: The dimension that a branch's width is of.
        dtype: Of parameters and input.
        prepare: Changes the branches before the chain is built.
        seed: Another one gives other parameters.
        options: See `Adapter.build`.

    Attributes:
        net: The chain.
        x: An input that is a leaf and requires a gradient.
    """

    def __init__(
        self,
        adapter: Adapter,
        device: torch.device,
        branch: Maker = mlp,
        shape: tuple[int, ...] = (5, 4),
        *,
        depth: int = 3,
        split_dim: int = 1,
        dtype: torch.dtype = torch.float64,
        prepare: Callable[[list[Pair]], list[Pair]] = list,
        seed: int = 1,
        **options: Any,
    ) -> None:
        self.adapter = adapter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = shape[split_dim]
            out = width * adapter.formula.factor
            pairs = [
                (branch(width, out).to(device, dtype), branch(width, out).to(device, dtype))
                for _ in range(depth)
            ]
            whole = [size * 2 if dim == split_dim else size for dim, size in enumerate(shape)]
            self.x = torch.randn(whole, dtype=dtype).to(device).requires_grad_()
        self.net = adapter.build(prepare(pairs), split_dim, **options)

    def __call__(self, x: Tensor | None = None, **kwargs: Tensor) -> Tensor:
        """Runs the chain behind another operation, as in a net."""
        x = (self.x if x is None else x).clone()
        if kwargs:
            return self.adapter.call(self.net, x, **kwargs)
        y: Tensor = self.net(x)
        return y

    @property
    def pairs(self) -> list[Pair]:
        """The branches in the chain."""
        return self.adapter.pairs(self.net)

    @property
    def branches(self) -> list[nn.Module]:
        """All branches, in the order of the forward pass."""
        return [branch for pair in self.pairs for branch in pair]

    def parts(self, kind: type[nn.Module]) -> list[Any]:
        """Lists the modules of a kind in the branches, each once."""
        found = [m for branch in self.branches for m in branch.modules() if isinstance(m, kind)]
        return list(dict.fromkeys(found))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters, by names that do not depend on the library."""
        return {
            f"{position}.{name.replace('_orig_mod.', '')}": parameter
            for position, branch in enumerate(self.branches)
            for name, parameter in branch.named_parameters()
        }

    def observe(self, **more: Any) -> dict[str, Any]:
        """Returns the gradients and buffers as they stand, beside what the caller saw."""
        seen: dict[str, Any] = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in more.items()
        }
        seen["gradient of the input"] = _copy(self.x.grad)
        for name, parameter in self.parameters.items():
            seen[f"gradients of parameters: {name}"] = _copy(parameter.grad)
        for position, branch in enumerate(self.branches):
            for name, buffer in branch.named_buffers():
                exact = not (buffer.is_floating_point() or buffer.is_complex())
                seen[f"buffers: {position}.{name}"] = buffer.tolist() if exact else buffer.clone()
        return seen

    def zero_grad(self) -> None:
        """Drops the gradients of input and parameters."""
        self.x.grad = None
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, *, buffers: bool = True) -> dict[str, Any]:
        """Observes one ordinary step from no gradients."""
        self.zero_grad()
        y = self()
        loss_of(y).backward()
        seen = self.observe(output=y)
        return {name: seen[name] for name in seen if buffers or not name.startswith("buffers")}

    def plain_twin(self) -> Subject:
        """Copies the branches into a plain chain."""
        twin = copy.copy(self)
        twin.adapter = Plain(self.adapter.formula)
        twin.net = twin.adapter.build(copy.deepcopy(self.pairs))
        twin.x = self.x.detach().clone().requires_grad_()
        return twin


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()
