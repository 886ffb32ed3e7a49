"""The tape of one forward call: what is kept, and a cursor over the streams.

Between forward and backward a chain keeps its outputs (which the next layer keeps anyway), the
small replay records, and the kept inputs of blocks that ask for it. The backward pass walks down
from the outputs: `_seek(k)` gives the streams as they stood before step `k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from revcore.drift import track_drift
from revcore.grid import compare_sums
from revcore.randomness import is_capturing
from revcore.replay import Replay
from revcore.shards import explain
from revcore.step import Differentiate, Gradients
from revcore.streams import Streams, alone
from revcore.surroundings import Surroundings
from revcore.versions import versions

_SECOND_TIME = (
    "Trying to backward through a reversible chain or a recomputed module a second time, after "
    "what it kept has been freed. Specify retain_graph=True in the first backward pass."
)


class Saved:
    """Streams that are kept, guarded against changes in place."""

    def __init__(self, streams: Sequence[Tensor], what: str) -> None:
        # A detached tensor shares storage and version counter with the caller's, and holds no
        # graph: no reference cycle, and every in-place change is seen, through views too.
        self._tensors = tuple(stream.detach() for stream in streams)
        self._versions = versions(self._tensors)
        self._what = what

    def get(self) -> Streams:
        """Returns the streams.

        Raises:
            RuntimeError: If one of them has been changed in place.
        """
        if self._versions != versions(self._tensors):
            raise RuntimeError(
                f"{self._what} has been modified by an in-place operation, so its activations "
                "cannot be reconstructed. Use the out-of-place version, such as torch.relu(y) for "
                "y.relu_(), or modify y.clone()."
            )
        return self._tensors


class Tape:
    """Everything that one forward call of a chain keeps until its backward pass."""

    def __init__(self) -> None:
        # The steps of this call, and how to repeat their branches.
        self.records: list[Replay] = []
        self._surroundings = Surroundings()
        # The true streams before each step, where drift is measured.
        self.drift = track_drift.current
        self.truth: list[Streams] = []
        # How many nodes there are, and the first steps of those that need it no more.
        self.nodes = 0
        self._done: set[int] = set()
        # Streams that are kept, by the step before which they stood; the outputs come after all.
        self.anchors: dict[int, Saved] = {}
        # Those of the streams before all steps, if these must come back bit for bit.
        self.sums: Tensor | None = None
        self._sums: list[int] | None = None
        # A step, and the streams as they stood before it.
        self._cursor: tuple[int, list[Tensor]] | None = None
        self._side: torch.cuda.Stream | None = None
        # The step before the one that was differentiated last, if it has been rebuilt meanwhile.
        self._ahead: tuple[int, list[Tensor], Differentiate, torch.cuda.Stream] | None = None

    def keep(self, index: int, streams: Streams) -> None:
        """Keeps the streams as they stood before step `index`, to restart from exactly."""
        what = "an input that a reversible chain or revcore.recompute keeps"
        self.anchors[index] = Saved(streams, what)

    def seal(self, outputs: Sequence[Tensor], *, overlap: bool) -> None:
        """Ends the recording.

        Args:
            outputs: The tensors from which everything is reconstructed.
            overlap: Whether to rebuild a step while the one after it is differentiated, if a CUDA
                graph is being captured. Without one the GPU waits for Python, not for itself.
        """
        self.anchors[len(self.records)] = Saved(outputs, "the output of a reversible chain")
        if self.sums is not None:
            # The host has just waited for the device to know that nothing overflowed.
            self._sums, self.sums = self.sums.tolist(), None
        if overlap and is_capturing(outputs[0].device):
            self._side = side_stream(outputs[0].device)

    def differentiate(
        self, steps: range, grads: Gradients, *, retain: bool, whole: bool
    ) -> list[Tensor | None]:
        """Takes the gradients of all streams from after some steps to before them.

        Args:
            steps: The steps of a node, in the order of the forward pass.
            grads: Gradients of all streams, which are replaced.
            retain: Whether another backward pass may follow, so that what is kept stays.
            whole: Whether this pass begins with the last node and goes on to those before it.

        Returns:
            Gradients of the leaves of the steps' branches, from the last step to the first.

        Raises:
            RuntimeError: If what the chain kept has been freed or changed in place.
        """
        if not self.records:
            raise RuntimeError(_SECOND_TIME)
        # One look at the branches is enough for all of these steps.
        seen = self.records[steps.start].seen
        seen.same = seen.look()
        try:
            with nullcontext() if self._surroundings.are_here() else self._surroundings.again():
                found = self._go_down(steps, grads, retain=retain or not whole)
        except RuntimeError as error:
            explain(error, [replay.parameters() for replay in self.records])
            raise
        finally:
            seen.same = None
        if steps.start == 0:
            self._cursor = None
        if not retain:
            self._done.add(steps.start)
        if len(self._done) == self.nodes:
            # Nothing needs the tape any more, and the graph may live as long as the loss.
            self.records.clear()
            self.truth.clear()
            self.anchors.clear()
        return found

    def _go_down(self, steps: range, grads: Gradients, *, retain: bool) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        if self._side is not None:
            for index in reversed(steps):
                found += self._overlapped(self._side, index, grads, retain=retain)
            return found
        streams = self._seek(steps.stop, retain=retain)
        # Where streams are small, to look costs more than it may save.
        large = streams[0].numel() > 2**12
        for index in reversed(steps):
            of_leaves = self._rebuild(index, streams)(grads)
            # A part of a larger tensor would keep all of it until the last step.
            found += [None if g is None else alone(g) for g in of_leaves] if large else of_leaves
        self._cursor = (steps.start, streams)
        if steps.start == 0 and self._sums is not None and 0 not in self.anchors:
            compare_sums(self._sums, streams)
        return found

    def _overlapped(
        self, side: torch.cuda.Stream, index: int, grads: Gradients, *, retain: bool
    ) -> Sequence[Tensor | None]:
        # Autograd differentiates on the CUDA stream on which a graph was made, so the steps take
        # turns on two. Each begins when the other has finished, and their memory is therefore safe:
        # what one frees, the other does not use any more. The cursor keeps what both read.
        main = torch.cuda.current_stream(side.device)
        side.wait_stream(main)
        if self._ahead is not None and self._ahead[0] == index:
            _, streams, differentiate, lane = self._ahead
        else:
            lane, streams = main, self._seek(index + 1, retain=retain)
            differentiate = self._rebuild(index, streams)
            side.wait_stream(main)
        self._ahead, self._cursor = None, (index, streams)
        if index > 0:
            other = main if lane is side else side
            streams = list(streams)
            with torch.cuda.stream(other):
                self._ahead = (index - 1, streams, self._rebuild(index - 1, streams), other)
        with torch.cuda.stream(lane):
            found = differentiate(grads)
        main.wait_stream(side)
        return found

    def _rebuild(self, index: int, streams: list[Tensor]) -> Differentiate:
        """Takes the streams from after step `index` to before it."""
        replay = self.records[index]
        saved = self.anchors.get(index)
        differentiate = replay.step.rebuild(replay, streams, None if saved is None else saved.get())
        if self.drift is not None:
            self.drift.compare(replay.step.branch, streams, self.truth[index])
        return differentiate

    def _seek(self, index: int, *, retain: bool) -> list[Tensor]:
        """Returns the streams as they stood before step `index`, or after all for the last.

        The cursor is handed out, not shared, so that a thread that finds none restarts.
        """
        cursor, self._cursor = self._cursor, None
        if cursor is not None and cursor[0] == index:
            return cursor[1]
        start = min((i for i in self.anchors if i >= index), default=len(self.records))
        if cursor is not None and index <= cursor[0] <= start:
            position, streams = cursor
        else:
            position, streams = start, self._restart(start, retain=retain)
        while position > index:
            position -= 1
            replay = self.records[position]
            replay.step.undo(replay, streams)
        return streams

    def _restart(self, start: int, *, retain: bool) -> list[Tensor]:
        if start not in self.anchors:
            raise RuntimeError(_SECOND_TIME)
        streams = list(self.anchors[start].get())
        if start == len(self.records) and not retain:
            # Handed over, not copied: the outputs' memory is free once both streams moved on.
            del self.anchors[start]
        return streams


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the second CUDA stream of a device, always the same."""
    return torch.cuda.Stream(device)
