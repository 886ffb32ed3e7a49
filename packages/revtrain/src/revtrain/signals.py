"""SIGTERM and Ctrl-C end a run between two steps, at the same step on all processes."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, final

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass Ctrl-C on to processes that the terminal has told already.
_SECONDS_OF_ONE_INTERRUPT = 1.0


class Interrupted(SystemExit):
    """A signal ended the run; its checkpoint is written.

    Python exits silently with the shell's status for this signal (143 or 130) if nothing catches
    it.

    Attributes:
        signal: Which one.
        step: The step after which the run stopped.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)
        self.step = step


@final
class StopSignals:
    """Turns SIGTERM and SIGINT into a question that the training loop asks after each step.

    A signal may reach one process alone, or each at another step, and who stops alone leaves the
    others waiting in the next all-reduce. So all processes exchange what they have heard, after
    every step, by an all-reduce of one number between the hosts, whatever the devices are. It runs
    in the background and is read one step later: no step waits for it, and no device.

    A second Ctrl-C interrupts at once, as does one before the loop or after it.
    """

    def __init__(self) -> None:
        self._heard = 0
        self._heard_at = 0.0
        self._old: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> StopSignals:
        # Python lets no other thread set handlers; what else runs there must look after signals.
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                if signal.getsignal(name) is not signal.SIG_IGN:  # as in a shell's background
                    self._old[name] = signal.signal(name, self._hear)
        # After the handlers: nobody gets here before all have them.
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, handler in self._old.items():
            signal.signal(name, handler)
        # After an error the others may be gone, and nobody is left to answer.
        if self._group is not None and (kind is None or kind is Interrupted):
            if self._pending is not None:
                self._pending[0].wait()
            dist.destroy_process_group(self._group)

    def agreed(self) -> int:
        """Returns the signal that one of the processes heard, or 0; the same on all of them.

        All must call it equally often.
        """
        if self._group is None:
            return self._heard
        agreed = 0
        if self._pending is not None:
            work, heard = self._pending
            work.wait()
            agreed = int(heard.item())
        heard = torch.tensor([self._heard], dtype=torch.int32)
        work = dist.all_reduce(heard, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, heard
        return agreed

    def _hear(self, signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        again = self._heard == signum and now - self._heard_at > _SECONDS_OF_ONE_INTERRUPT
        if signum == signal.SIGINT and again:
            raise KeyboardInterrupt
        if not self._heard:
            self._heard, self._heard_at = signum, now
