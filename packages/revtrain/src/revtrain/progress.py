"""Progress on the terminal, or one line an epoch where there is none."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from revtrain.meter import Averages, Meter

_SECONDS_BETWEEN_UPDATES = 0.5


@final
class TrainProgress:
    """Shows epoch, loss, accuracy, images per second and the time that is left, on stderr.

    The numbers are on the device, and reading them waits for it. So they are read by the clock,
    about twice a second, and not at every step.

    Args:
        total_steps: Steps of the whole run.
        epochs: Epochs of the whole run.
        enabled: False for silence: all processes but the first.
    """

    def __init__(self, total_steps: int, epochs: int, *, enabled: bool) -> None:
        self._console = Console(stderr=True, quiet=not enabled)
        self._enabled = enabled
        self._epochs = epochs
        self._width = len(str(epochs))
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            # Without a terminal the lines of `epoch_done` are all that is wanted.
            disable=not (enabled and self._console.is_terminal),
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total_steps, epoch="", numbers="")
        self._next_update = 0.0

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def step_done(self, step: int, epoch: int, meter: Meter, seconds: float) -> Averages | None:
        """Shows a step of an epoch that has taken `seconds` so far.

        Returns:
            The averages, if it was time to read them.
        """
        now = time.perf_counter()
        if not self._enabled or now < self._next_update:
            return None
        averages = meter.read()
        self._next_update = time.perf_counter() + _SECONDS_BETWEEN_UPDATES
        self._bar.update(
            self._task,
            completed=step,
            epoch=f"{epoch}/{self._epochs}",
            numbers=(
                f"loss {averages.loss:.3f}  acc {averages.accuracy:6.2%}  "
                f"{averages.images / max(seconds, 1e-9):,.0f} img/s"
            ),
        )
        return averages

    def epoch_done(self, record: dict[str, Any], split: str) -> None:
        """Prints the line of an epoch, above the bar if there is one."""
        self._console.print(
            f"epoch {record['epoch']:>{self._width}}/{self._epochs}  "
            f"loss {record['train_loss']:.3f}  train {record['train_accuracy']:6.2%}  "
            f"{split} {record[f'{split}_accuracy']:6.2%}  "
            f"lr {record['lr']:.4f}  {record['images_per_second']:,.0f} img/s  "
            f"{record['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
