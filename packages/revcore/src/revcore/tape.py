"""The tape of one forward call: what is kept, and a cursor over the streams.

Between forward and backward a chain keeps its outputs (which the next layer keeps anyway), the
small replay records, and the kept inputs of blocks that ask for it. The backward pass walks down
from the outputs: `seek(k)` gives the streams as they stood before step `k`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revcore.drift import track_drift
from revcore.replay import Replay
from revcore.step import Step
from revcore.streams import Streams
from revcore.versions import version

_SECOND_TIME = (
    "Trying to backward through a reversible chain a second time, after its saved outputs have "
    "been freed. Specify retain_graph=True in the first backward pass."
)


class Saved:
    """Streams that are kept, guarded against changes in place."""

    def __init__(self, streams: Sequence[Tensor], what: str) -> None:
        # A detached tensor shares storage and version counter with the caller's, and holds no
        # graph: no reference cycle, and every in-place change is seen, through views too.
        self._tensors = tuple(stream.detach() for stream in streams)
        self._versions = tuple(version(stream) for stream in self._tensors)
        self._what = what

    def get(self) -> list[Tensor]:
        """Returns the streams.

        Raises:
            RuntimeError: If one of them has been changed in place.
        """
        if self._versions != tuple(version(stream) for stream in self._tensors):
            raise RuntimeError(
                f"{self._what} of a reversible chain has been modified by an in-place operation, "
                "so its activations cannot be reconstructed. Use the out-of-place version, such "
                "as torch.relu(y) for y.relu_(), or modify y.clone()."
            )
        return list(self._tensors)


class Tape:
    """Everything that one forward call of a chain keeps until its backward pass."""

    def __init__(self) -> None:
        # Each step of this call, and how to repeat its branch.
        self.records: list[tuple[Step, Replay]] = []
        # The true streams before each step, where drift is measured.
        self.drift = track_drift.current
        self.truth: list[Streams] = []
        self.anchors: dict[int, Saved] = {}
        self._outputs: Saved | None = None
        self._cursor: tuple[int, list[Tensor]] | None = None
        self._released = False

    def keep(self, streams: Streams) -> None:
        """Keeps the streams as they stand now, as an exact point to restart from."""
        self.anchors[len(self.records)] = Saved(streams, "a kept input")

    def seal(self, outputs: Sequence[Tensor]) -> None:
        """Ends the recording with the tensors from which everything is reconstructed."""
        self._outputs = Saved(outputs, "the output")

    def anchor(self, index: int) -> list[Tensor] | None:
        """Returns the streams before step `index` if they were kept."""
        saved = self.anchors.get(index)
        return None if saved is None else saved.get()

    def seek(self, index: int, *, retain: bool) -> list[Tensor]:
        """Returns the streams as they stood before step `index`, or after all for the last.

        The cursor is handed out, not shared, so that a thread that finds none restarts.

        Args:
            index: A step, or the number of steps.
            retain: Whether another backward pass may follow, so that what is kept stays.

        Raises:
            RuntimeError: If what the chain kept has been freed or changed in place.
        """
        if self._released:
            raise RuntimeError(_SECOND_TIME)
        cursor, self._cursor = self._cursor, None
        if cursor is not None and cursor[0] == index:
            return cursor[1]
        start = len(self.records)
        if self.anchors:
            start = min((i for i in self.anchors if i >= index), default=start)
        if cursor is not None and index <= cursor[0] <= start:
            position, streams = cursor
        else:
            position, streams = start, self._restart(start, retain=retain)
        while position > index:
            position -= 1
            step, replay = self.records[position]
            with torch.no_grad():
                step.undo(replay, streams)
        return streams

    def _restart(self, start: int, *, retain: bool) -> list[Tensor]:
        if start in self.anchors:
            return self.anchors[start].get()
        if self._outputs is None:
            raise RuntimeError(_SECOND_TIME)
        streams = self._outputs.get()
        if not retain:
            # Handed over, not copied: the outputs' memory is free once both streams moved on.
            self._outputs = None
        return streams

    def leave(self, index: int, streams: list[Tensor], *, retain: bool) -> None:
        """Ends the visit of step `index`, with the streams as they stood before it."""
        if self.drift is not None:
            branch = self.records[index][0].branch
            self.drift.compare(branch, streams, self.truth[index])
        if index > 0:
            self._cursor = (index, streams)
        elif not retain:
            # Nothing needs the tape any more, and the graph may live as long as the caller's loss.
            self._released = True
            self.records.clear()
            self.truth.clear()
            self.anchors.clear()
            self._outputs = None
