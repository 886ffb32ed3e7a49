"""One training run of several_gpus.py, in as many processes as it is launched in.

Beside the run folder it writes what that does not hold: the loss of every step, a digest of the
samples of some batches, and a digest of the weights of every rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from revtrain.config import TrainConfig
from revtrain.files import write_json
from revtrain.meter import Meter
from revtrain.net import unwrap
from revtrain.step import TrainStep
from revtrain.trainer import Trainer

_BATCHES = 10  # whose samples are compared, of two epochs


class LossOfEachStep:
    """A step that notes its loss; in all else the step that it is given."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self.losses: list[Tensor] = []

    def __call__(self, x: Tensor, labels: Tensor, meter: Meter) -> None:
        own = self

        class Tee:
            def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
                own.losses.append(loss.detach().clone())
                meter.update(loss, logits, labels)

        self._step(x, labels, Tee())  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="fields of TrainConfig, as JSON")
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    # With TF32, whose rounding is a thousand times coarser, curves part sooner.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(chosen.config).items()
    }
    trainer = Trainer(TrainConfig(**values, fresh=True, memory=False))
    accelerator = trainer.accelerator
    step = LossOfEachStep(trainer.step)
    trainer.step = step  # type: ignore[assignment]
    samples = digest_of_samples(trainer)
    result = trainer.run()
    # Slices are of equal size, so the mean over ranks is that of the batch.
    losses = accelerator.reduce(torch.stack(step.losses), reduction="mean").tolist()
    weights = gather_object([digest(unwrap(trainer.model, accelerator).state_dict())])
    if accelerator.is_main_process:
        keys = ("epoch", "train_loss", "test_loss", "test_accuracy", "images_per_second")
        write_json(
            chosen.output,
            {
                "processes": accelerator.num_processes,
                "step_losses": losses,
                "epochs": [{key: record[key] for key in keys} for record in result.metrics],
                "samples": samples,
                "weights_of_ranks": weights,
            },
        )


def digest_of_samples(trainer: Trainer) -> list[str]:
    """Returns a digest of each of some batches: of all augmented images, with their labels."""
    digests = []
    for epoch in (0, 1):
        trainer.train_loader.set_epoch(epoch)
        for _, (x, labels) in zip(range(_BATCHES), trainer.train_loader, strict=False):
            digests.append(digest_of_batch(x, labels, trainer.accelerator))
    return digests


def digest_of_batch(x: Tensor, labels: Tensor, accelerator: Accelerator) -> str:
    images = accelerator.gather(x.contiguous()).cpu().numpy()
    classes = accelerator.gather(labels).tolist()
    # Which rank has which sample is no matter.
    each = sorted(
        hashlib.sha256(image.tobytes() + bytes([label])).digest()
        for image, label in zip(images, classes, strict=True)
    )
    return hashlib.sha256(b"".join(each)).hexdigest()


def digest(state: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
