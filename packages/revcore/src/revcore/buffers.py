"""The buffers of a branch around its first run, and as its repetition must find them.

Most changes of a tensor are counted by torch. `F.batch_norm` does not count those of running
statistics, nor does anybody those of `.data`, so small buffers are compared with a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from revcore.known import BATCH_NORMS
from revcore.randomness import is_capturing
from revcore.survey import ABSENT, Change
from revcore.versions import changed, version

# Bytes of a buffer that is a constant rather, such as a table of positions.
_LARGE = 2**20

# Modules that change buffers uncounted, and large buffers that a module has left alone, by its
# training flag.
_movers: WeakSet[nn.Module] = WeakSet()
_constants: WeakKeyDictionary[nn.Module, set[tuple[str, bool]]] = WeakKeyDictionary()


class _Buffer(NamedTuple):
    """A buffer before a run.

    Attributes:
        module: It belongs to this one.
        name: By this name.
        value: The tensor, or None.
        version: Its version.
        copy: A copy of it. There is none of one that takes a gradient, which a copy would take
            away, in silence, nor of a large one that has not changed so far.
    """

    module: nn.Module
    name: str
    value: Tensor | None
    version: int
    copy: Tensor | None

    def has_moved(self) -> bool:
        """Tells whether there is another one in its place, or whether a change was counted."""
        return get(self.module._buffers, self.name) is not self.value or self.is_changed()

    def is_changed(self) -> bool:
        """Tells whether a change was counted."""
        return self.value is not None and version(self.value) != self.version

    def may_move_unseen(self) -> bool:
        """Tells whether to compare it with its copy."""
        if self.copy is None or type(self.module) in BATCH_NORMS:  # in evaluation, as they are here
            return False
        return self.copy.layout is torch.strided and self.copy.nbytes <= _LARGE


class Buffers:
    """What has become of the buffers of a branch in its first run.

    Args:
        modules: The modules of the branch whose buffers matter.
        before: What `notes_of` gave before the run.

    Attributes:
        moved: The buffers that the run has changed: their modules, names and copies.
        suspects: Those that it may have changed, uncounted.
    """

    def __init__(self, modules: Sequence[nn.Module], before: Sequence[_Buffer]) -> None:
        names = {(buffer.module, buffer.name) for buffer in before}
        new = [(module, name) for module, name, _ in _buffers_of(modules)]
        self.moved: list[tuple[nn.Module, str, Any]] = [
            (*each, ABSENT) for each in new if each not in names
        ]
        self.suspects: list[_Buffer] = []
        self._unmoved: list[_Buffer] = []
        for buffer in before:
            module, name, value, _, copy = buffer
            if buffer.has_moved() and (value is None or copy is not None):
                self.moved.append((module, name, copy))
                continue
            self._unmoved.append(buffer._replace(copy=None))
            if buffer.may_move_unseen():
                self.suspects.append(buffer)
            elif copy is not None:
                _constants.setdefault(module, set()).add((name, module.training))

    def __bool__(self) -> bool:
        return bool(self._unmoved or self.moved)

    def have_moved(self) -> bool:
        """Tells whether the run has changed any of them; waits for the device to say so."""
        return bool(self.moved or any(map(_has_moved_unseen, self.suspects)))

    def find_changes(self) -> list[Change]:
        """Lists the buffers that are other ones now: where, and what was there.

        Raises:
            RuntimeError: If one has been changed in place.
        """
        changes: list[Change] = []
        for buffer in self._unmoved:
            module, name, value, *_ = buffer
            if buffer.is_changed():
                raise changed(f"buffer {name!r} of {type(module).__name__}")
            if get(module._buffers, name) is not value:
                changes.append((module._buffers, name, value))
        # Clones, because a graph that is retained may be run backward again.
        suspects = [(module, name, copy) for module, name, _, _, copy in self.suspects]
        for module, name, copy in [*self.moved, *suspects]:
            wanted = copy.clone() if isinstance(copy, Tensor) else copy
            changes.append((module._buffers, name, wanted))
        return changes


def settle(every: Sequence[Buffers]) -> None:
    """Drops the copies of buffers that first runs have left as they were, which most are."""
    asked = [suspect for buffers in every for suspect in buffers.suspects if _may_drop(suspect)]
    if not asked:
        return
    # One look for all, because the host waits for a GPU there.
    moved = [_differs(suspect) for suspect in asked]
    flags = torch.stack([flag.to(moved[0].device) for flag in moved]).tolist()
    unmoved = {id(suspect) for suspect, flag in zip(asked, flags, strict=True) if not flag}
    _movers.update(suspect.module for suspect in asked if id(suspect) not in unmoved)
    for buffers in every:
        buffers.suspects = [suspect for suspect in buffers.suspects if id(suspect) not in unmoved]


def _may_drop(buffer: _Buffer) -> bool:
    # One that does not change in evaluation may in training, before the backward pass. In a
    # ScriptModule it could not be put back.
    module = buffer.module
    asks = module.training or isinstance(module, torch.jit.ScriptModule)
    return asks and module not in _movers and _is_readable(buffer)


def _has_moved_unseen(buffer: _Buffer) -> bool:
    if not _is_readable(buffer):
        return buffer.module in _movers
    if moved := bool(_differs(buffer)):
        _movers.add(buffer.module)
    return moved


def _is_readable(buffer: _Buffer) -> bool:
    value: Any = buffer.value
    return (
        type(value) is Tensor
        and value.is_contiguous()
        and not (value.is_meta or value.is_quantized or value.is_conj() or value.is_neg())
        and not is_capturing(value.device)
    )


def _differs(buffer: _Buffer) -> Tensor:
    # Their bits: some dtypes cannot be compared, and NaN is not what it is.
    both: Any = (buffer.value, buffer.copy)
    now, before = (tensor.detach().view(-1).view(torch.uint8) for tensor in both)
    return torch.tensor(True) if now.shape != before.shape else torch.ne(now, before).any()


def get(table: Any, name: str) -> Any:
    """Returns an entry of a table, or None; a ScriptModule's tables have no `get`."""
    return table[name] if name in table else None  # noqa: SIM401


def _buffers_of(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor | None]]:
    return [(module, *item) for module in modules for item in module._buffers.items()]


def notes_of(modules: Sequence[nn.Module]) -> list[_Buffer]:
    """Notes the buffers of modules before a run."""
    return [_note(*each) for each in _buffers_of(modules)]


def _note(module: nn.Module, name: str, value: Tensor | None) -> _Buffer:
    if value is None:
        return _Buffer(module, name, None, 0, None)
    constant = value.requires_grad or (name, module.training) in _constants.get(module, ())
    return _Buffer(module, name, value, version(value), None if constant else value.clone())
