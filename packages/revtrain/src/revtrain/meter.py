"""Loss and accuracy, summed where they arise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Averages:
    """Mean loss and accuracy (in 0..1) over `images` images."""

    loss: float
    accuracy: float
    images: int


class Meter:
    """Sums loss and hits on the device, so that no step waits for the host to read a number.

    Example:
        >>> meter = Meter(torch.device("cpu"))
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
        >>> meter.update(torch.tensor(0.5), logits, torch.tensor([0, 0]))
        >>> meter.read()
        Averages(loss=0.5, accuracy=0.5, images=2)
    """

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._images = 0

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: its mean loss, its logits (N, K) and its labels (N,)."""
        self._loss += loss.detach().float() * len(labels)
        self._hits += (logits.argmax(1) == labels).sum()
        self._images += len(labels)

    def sums(self, accelerator: Accelerator) -> list[list[float]]:
        """Returns loss, hits and images of each process, exactly; all processes must call."""
        images = torch.tensor([self._images], device=self._hits.device)
        sums = (self._loss[None], self._hits[None], images)
        columns = [accelerator.gather(value).tolist() for value in sums]
        return [list(row) for row in zip(*columns, strict=True)]

    def restore(self, sums: list[list[float]], accelerator: Accelerator) -> None:
        """Goes on from what `sums` returned.

        With another number of processes than then the first one takes all: the averages over all
        processes are the same, up to rounding.
        """
        if len(sums) != accelerator.num_processes:
            total = [sum(column) for column in zip(*sums, strict=True)]
            sums = [total] + [[0.0, 0, 0]] * (accelerator.num_processes - 1)
        loss, hits, images = sums[accelerator.process_index]
        self._loss.fill_(loss)
        self._hits.fill_(int(hits))
        self._images = int(images)

    def read(self, accelerator: Accelerator | None = None) -> Averages:
        """Waits for the device and returns the averages so far.

        Args:
            accelerator: If given, the averages are those over all processes, which must all call.
        """
        images = torch.tensor(self._images, device=self._hits.device)
        sums = (self._loss, self._hits, images)
        if accelerator is not None:
            sums = accelerator.gather_for_metrics(sums)
        loss, hits, seen = (value.sum().item() for value in sums)
        return Averages(loss / max(seen, 1), hits / max(seen, 1), int(seen))
