"""The training loop, of which there is one: for any device and any number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from revtrain.config import TrainConfig
from revtrain.data import load_images, make_loader, refuse_more_classes
from revtrain.evaluation import BATCH_SIZE, measure_accuracy
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.memory import DEPTHS, DepthCost, compare_memory, memory_json
from revtrain.meter import Averages, Meter
from revtrain.net import NetSpec, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.peak import peak_memory, reset_peak_memory
from revtrain.plots import plot_curve, plot_memory
from revtrain.progress import TrainProgress
from revtrain.provenance import provenance
from revtrain.run_folder import RunFolder
from revtrain.step import TrainStep
from revtrain.sync_batchnorm import synchronize_batchnorm
from revtrain.tracking import tracking


class NonFiniteLossError(RuntimeError):
    """The loss is infinite or not a number, so there is nothing left to train."""


@dataclass(frozen=True)
class Result:
    """What a training run ends with.

    Attributes:
        run_folder: Where its files are.
        summary: What `summary.json` holds: accuracy, loss, time and memory.
        metrics: One record for each epoch, as `metrics.jsonl` holds them.
        memory: Memory and time over depth, reversing and stored; empty if not asked for.
    """

    run_folder: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    memory: list[DepthCost]


def train(config: TrainConfig) -> Result:
    """Trains a network and writes its run folder.

    With several processes (`accelerate launch`, `torchrun`), all call it with the same
    configuration.

    Args:
        config: What to train, on what, and how.

    Returns:
        The results, the same that the run folder holds.

    Raises:
        ValueError: The configuration cannot be: an unknown name, a size out of range. Like all
            errors of this kind it is raised before anything is written.
        FileExistsError: The run folder holds a run, and `config.fresh` is not set.
        revdata.DataError: The data are missing or damaged.
        NonFiniteLossError: The loss is no longer a number.
    """
    return Trainer(config).run()


class Trainer:
    """A run that has been checked and loaded, and can be started.

    All that a user may have got wrong is found here, before `run` does any work.

    Args:
        config: What to train, on what, and how.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.started = time.perf_counter()
        self.config = config
        self.recipe = recipe = config.resolved_recipe
        self.folder = RunFolder(config.run_folder)
        if not config.fresh:
            self.folder.refuse_old_run()
        self.accelerator = accelerator = make_accelerator(
            cpu=config.cpu, mixed_precision=config.mixed_precision
        )
        device = accelerator.device

        train_split, self.test_split = ("fit", "val") if config.val else ("train", "test")
        # All processes at once: a lock makes one of them download. In a barrier the others would
        # wait for longer than a process group allows.
        train_images, test_images = (
            load_images(
                config.data,
                split,
                data_dir=config.data_dir,
                verify=config.verify,
                download=config.download,
                mirror=config.mirror,
            )
            for split in (train_split, self.test_split)
        )
        num_classes = config.num_classes or len(train_images.classes)
        refuse_more_classes(train_images, num_classes)
        self.train_loader = make_loader(
            train_images,
            recipe.batch_size,
            accelerator,
            kind=config.loader,
            train=True,
            augment=recipe.augment,
            seed=config.seed,
        )
        self.test_loader = make_loader(test_images, BATCH_SIZE, accelerator, kind=config.loader)

        # The same seed on all processes: the initial weights agree.
        set_seed(config.seed)
        self.spec = NetSpec.of(
            config.model,
            num_classes,
            train_images.images.shape[1],
            config.blocks,
            config.channels,
        )
        model = self.spec.build(reversing=not config.stored)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        if accelerator.num_processes > 1:
            model = synchronize_batchnorm(model, device)
        model = to_device(model, device)

        self.steps_per_epoch = len(self.train_loader)
        self.total_steps = recipe.steps or (recipe.epochs or 0) * self.steps_per_epoch
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        optimizer = make_optimizer(model, recipe)
        scheduler = make_scheduler(optimizer, recipe, self.total_steps)
        self.model, self.optimizer, self.scheduler = accelerator.prepare(
            model, optimizer, scheduler
        )
        self.step = TrainStep(
            self.model,
            self.optimizer,
            self.scheduler,
            accelerator,
            label_smoothing=recipe.label_smoothing,
        )

    def run(self) -> Result:
        """Trains, evaluates after each epoch, and writes the run folder."""
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        # Nobody may still be looking for an old run when the new one appears.
        accelerator.wait_for_everyone()
        description = self._description()
        if main:
            self.folder.start(description)
        metrics: list[dict[str, Any]] = []
        with (
            TrainProgress(self.total_steps, self.epochs, enabled=main) as progress,
            tracking(accelerator, self.config.log_with, self.folder.path, description) as log,
        ):
            for epoch in range(self.epochs):
                record = self._epoch(epoch, progress)
                metrics.append(record)
                progress.epoch_done(record, self.test_split)
                log(record)
                if main:
                    self.folder.write_metrics(metrics)
        summary = self._summary(metrics)
        memory: list[DepthCost] = []
        if main:
            state = accelerator.unwrap_model(self.model).state_dict()
            self.folder.write_weights(state, self.spec)
            self.folder.write_summary(summary)
            plot_curve(metrics, self.test_split, self.folder.plots("curve"))
            if self.config.memory and self.spec.architecture.reversible:
                memory = self._compare_memory()
        return Result(self.folder.path, summary, metrics, memory)

    def _epoch(self, epoch: int, progress: TrainProgress) -> dict[str, Any]:
        """Trains for one epoch and evaluates."""
        accelerator, device = self.accelerator, self.accelerator.device
        reset_peak_memory(device)
        meter = Meter(device)
        first = epoch * self.steps_per_epoch
        started = time.perf_counter()
        lr = 0.0
        self.model.train()
        for step, (x, labels) in enumerate(self._batches(epoch), start=first + 1):
            lr = self.scheduler.get_last_lr()[0]
            self.step(x, labels, meter)
            seconds = time.perf_counter() - started
            averages = progress.step_done(step, epoch + 1, meter, seconds)
            if averages is not None:
                self._refuse_non_finite(averages, step)
        averages = meter.read(accelerator)  # waits for the device, so the time is right
        seconds = time.perf_counter() - started
        steps = min(self.steps_per_epoch, self.total_steps - first)
        self._refuse_non_finite(averages, first + steps)
        # Without its wrapper: DDP synchronizes at each call, but ranks may have different numbers
        # of batches here.
        net = accelerator.unwrap_model(self.model)
        tested = measure_accuracy(net, self.test_loader, accelerator)
        return {
            "epoch": epoch + 1,
            "step": first + steps,
            "train_loss": averages.loss,
            "train_accuracy": averages.accuracy,
            f"{self.test_split}_loss": tested.loss,
            f"{self.test_split}_accuracy": tested.accuracy,
            "lr": lr,
            "seconds": seconds,
            "step_seconds": seconds / steps,
            "images_per_second": averages.images / seconds,
            "peak_memory_bytes": peak_memory(device),
        }

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this epoch's batches, as many as are left of the run."""
        self.train_loader.set_epoch(epoch)
        left = self.total_steps - epoch * self.steps_per_epoch
        for _, batch in zip(range(left), self.train_loader, strict=False):
            yield batch

    def _refuse_non_finite(self, averages: Averages, step: int) -> None:
        if not math.isfinite(averages.loss):
            raise NonFiniteLossError(
                f"the loss is {averages.loss} by step {step} of {self.total_steps}: lower the "
                f"learning rate (--lr, now {self.recipe.lr:g})"
                + (
                    " or train without --mixed-precision"
                    if self.accelerator.mixed_precision != "no"
                    else ""
                )
            )

    def _description(self) -> dict[str, Any]:
        """Returns what `config.json` holds."""
        return {
            "config": asdict(self.config),
            "recipe": asdict(self.recipe),
            "net": self.spec.to_json(),
            "parameters": self.parameters,
            "steps": self.total_steps,
            **provenance(self.accelerator),
        }

    def _summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns what `summary.json` holds."""
        last = metrics[-1]
        # The first epoch pays for starting up; the median of the others is what a step takes.
        usual = sorted(record["step_seconds"] for record in metrics[1:] or metrics)
        step_seconds = usual[len(usual) // 2]
        peaks = [record["peak_memory_bytes"] for record in metrics]
        return {
            "data": self.config.data,
            "model": self.config.model,
            "recipe": self.config.recipe,
            "seed": self.config.seed,
            **{key: value for key, value in last.items() if key.endswith(("_loss", "_accuracy"))},
            "parameters": self.parameters,
            "epochs": self.epochs,
            "steps": self.total_steps,
            "step_seconds": step_seconds,
            "images_per_second": self.recipe.batch_size / step_seconds,
            "peak_memory_bytes": max(peaks) if None not in peaks else None,
            "train_seconds": sum(record["seconds"] for record in metrics),
            "seconds": time.perf_counter() - self.started,
        }

    def _compare_memory(self) -> list[DepthCost]:
        """Measures memory over depth on the first batch, and writes table and picture."""
        self.train_loader.set_epoch(0)
        x, labels = next(iter(self.train_loader))
        depths: tuple[int, ...] = DEPTHS
        if len(set(self.spec.blocks)) == 1:
            depths = tuple(sorted({*DEPTHS, self.spec.blocks[0]}))
        with Console(stderr=True).status("measuring activation memory over depth"):
            costs = compare_memory(self.spec, x, labels, self.accelerator, depths)
        write_json(self.folder.memory, memory_json(self.spec, x, costs))
        plot_memory(costs, self.spec.model, self.folder.plots("memory"))
        return costs
