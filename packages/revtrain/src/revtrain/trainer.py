"""The training loop, of which there is one: for any device and any number of processes."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor

from revtrain.accumulate import refuse_unequal_parts
from revtrain.checkpoints import CheckpointError, Checkpoints
from revtrain.config import TrainConfig
from revtrain.data import load_data
from revtrain.deterministic import deterministic
from revtrain.drift import DriftWatch
from revtrain.evaluation import Evaluator
from revtrain.finish import write_results
from revtrain.launch import make_accelerator
from revtrain.memory import DepthCost, read_memory
from revtrain.meter import Averages, Meter
from revtrain.net import NetSpec, to_device, unwrap
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.peak import peak_memory, reset_peak_memory
from revtrain.progress import TrainProgress
from revtrain.provenance import provenance
from revtrain.result import Result, epoch_record, summarize
from revtrain.resume import RunState, refuse_other_run
from revtrain.run_folder import RunFolder
from revtrain.signals import Interrupted, StopSignals
from revtrain.step import TrainStep
from revtrain.sync_batchnorm import synchronize_batchnorm
from revtrain.tracking import tracking


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
        FileExistsError: The run folder holds a run, and neither `config.fresh` nor
            `config.resume` is set.
        CheckpointError: All checkpoints of the run that `config.resume` asks for are damaged, or
            the first checkpoint of a new run cannot be written.
        revdata.DataError: The data are missing or damaged.
        NonFiniteLossError: The loss or a gradient is no longer a number.
        DriftError: Reconstructed activations are further off than `config.drift_bound`.
        BusyError: Another process is training into the run folder.
        Interrupted: SIGTERM or Ctrl-C stopped the run, between two steps and with a checkpoint.
            Python exits with status 143 or 130 if nothing catches it.

    Example:
        >>> import tempfile
        >>> config = TrainConfig(
        ...     data="digits", epochs=1, blocks=(1, 1, 1), channels=(4, 4, 8, 8), memory=False,
        ...     out=Path(tempfile.mkdtemp(), "run"),
        ... )
        >>> result = train(config)
        >>> 0 < result.summary["test_accuracy"] < 1
        True
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
        if not (config.fresh or config.resume):
            self.folder.refuse_old_run()
        if config.resume:
            self.folder.refuse_strangers()
        if not (config.resume and self.folder.finished):
            self.folder.refuse_unwritable()
        self.accelerator = accelerator = make_accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            accumulate=config.accumulate,
        )
        refuse_unequal_parts(recipe.batch_size, accelerator)
        device = accelerator.device

        data = load_data(config, accelerator)
        self.train_loader, self.test_loader = data.train, data.test
        self.test_split = data.split

        # The same seed on all processes: the initial weights agree.
        set_seed(config.seed)
        self.spec = NetSpec.of(
            config.model, data.num_classes, data.channels, config.blocks, config.channels
        )
        model = self.spec.build(reversing=not config.stored, recompute=config.recompute)
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
            graph=config.graph,
        )
        # Without its wrapper: DDP synchronizes at each call, but ranks may have different numbers
        # of batches here.
        net = unwrap(self.model, accelerator)
        self.evaluator = Evaluator(net, accelerator, graph=config.graph)
        self.drift = DriftWatch(
            net, self.step, accelerator, every=config.drift_every, bound=config.drift_bound
        )

        self.state = RunState()
        self.checkpoints = Checkpoints(self.folder.checkpoints, accelerator)
        self._resumed: Path | None = None
        self._results: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
        if config.resume and self.folder.started:
            old = self.folder.read_config()
            refuse_other_run(old, self._description())
            if self.folder.finished:
                self._results = self.folder.read_results()
            else:
                self.checkpoints.run = old.get("run")
                self._resumed = self.checkpoints.newest()

    def run(self) -> Result:
        """Trains, evaluates after each epoch, and writes the run folder.

        Where the folder holds the finished run already, that is its result.
        """
        with deterministic(self.config.deterministic):
            return self._run()

    def _run(self) -> Result:
        # Nobody may still be looking for an old run when the new one appears.
        self.accelerator.wait_for_everyone()
        if self._results is not None:
            return Result(self.folder.path, *self._results, read_memory(self.folder.memory))
        if not self.accelerator.is_main_process:
            return self._train()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with self.folder.alone():
            return self._train()

    def _train(self) -> Result:
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        description = self._description()
        if self._resumed is not None:
            self._go_on(self._resumed)
        else:
            self.checkpoints.run = description["run"] = secrets.token_hex(8)
            if main:
                self.folder.start(description)
        state = self.state
        with (
            StopSignals() as signals,
            TrainProgress(self.total_steps, self.epochs, enabled=main) as progress,
            tracking(accelerator, self.config.log_with, self.folder, description) as log,
        ):
            if self._resumed is not None:
                progress.say(f"going on after step {state.step} of {self.total_steps}")
            else:
                # So that there is one behind every error; and where none can be written, nothing is
                # lost yet.
                self.checkpoints.save(0, state.to_json())
            for epoch in range(len(state.records), self.epochs):
                record = self._epoch(epoch, progress, signals)
                log(record)
                self._epoch_done(record, progress)
        summary = summarize(
            self.config,
            state.records,
            batch_size=self.recipe.batch_size,
            parameters=self.parameters,
            seconds=time.perf_counter() - self.started,
        )
        memory: list[DepthCost] = []
        if main:
            measure = self.config.memory and self.spec.architecture.reversible
            memory = write_results(
                self.folder,
                unwrap(self.model, accelerator),
                self.spec,
                accelerator,
                records=state.records,
                split=self.test_split,
                summary=summary,
                batch=self._first_batch() if measure else None,
            )
        return Result(self.folder.path, summary, state.records, memory)

    def _go_on(self, path: Path) -> None:
        """Restores a checkpoint."""
        self.state = RunState(**self.checkpoints.progress(path))
        if self.accelerator.num_processes > 1 and self.state.step:
            # DistributedDataParallel orders its buckets anew after the first backward pass, and
            # with them the sums over processes. Another run of as many steps has done so.
            x, labels = self._first_batch()
            self.accelerator.backward(F.cross_entropy(self.model(x), labels))
            self.optimizer.zero_grad()
        self.checkpoints.load(path)
        self.drift.worst = self.state.drift
        if self.accelerator.is_main_process:
            self.folder.go_on(self.state.step, provenance(self.accelerator))
            self.folder.write_metrics(self.state.records)

    def _epoch(self, epoch: int, progress: TrainProgress, signals: StopSignals) -> dict[str, Any]:
        """Trains what is left of an epoch and evaluates; returns its record."""
        accelerator, device, state = self.accelerator, self.accelerator.device, self.state
        reset_peak_memory(device)
        meter = Meter(device)
        if state.sums:
            meter.restore(state.sums, accelerator)
        started = time.perf_counter() - state.seconds
        self.model.train()
        for x, labels in self._batches(epoch):
            state.lr = self.scheduler.get_last_lr()[0]
            with self.drift.around(state.step + 1):
                self.step(x, labels, meter)
            state.step += 1
            state.seconds = time.perf_counter() - started
            progress.step_done(state.step, epoch + 1, meter, state.seconds)
            self._stop_if_told(signals, meter, progress)
            if self.config.save_every and state.step % self.config.save_every == 0:
                self._save(meter, progress)
                started = time.perf_counter() - state.seconds  # saving is no training
        self.step.check()
        averages = meter.read(accelerator)  # waits for the device, so the time is right
        seconds = state.seconds = time.perf_counter() - started
        tested = self._evaluate(lambda: self._stop_if_told(signals, meter, progress))
        record = epoch_record(
            epoch + 1,
            state.step,
            split=self.test_split,
            trained=averages,
            tested=tested,
            lr=state.lr,
            steps=state.step - epoch * self.steps_per_epoch,
            seconds=seconds,
            peak_memory_bytes=peak_memory(device, self.step.peak_bytes, self.evaluator.peak_bytes),
        )
        return record | ({"drift": self.drift.worst} if self.config.drift_every else {})

    def _epoch_done(self, record: dict[str, Any], progress: TrainProgress) -> None:
        """Writes a record and, unless other steps were asked for, a checkpoint."""
        state = self.state
        state.records.append(record)
        state.seconds, state.sums, self.drift.worst = 0.0, [], None
        progress.epoch_done(record, self.test_split)
        if self.accelerator.is_main_process:
            try:
                self.folder.write_metrics(state.records)
            except OSError as error:  # all of them are written again after the next epoch
                progress.say(f"cannot write {self.folder.metrics}: {error}")
        if not self.config.save_every or state.step == self.total_steps:
            self._save(None, progress)

    def _evaluate(self, after_batch: Callable[[], None]) -> Averages:
        return self.evaluator(self.test_loader, after_batch)

    def _stop_if_told(self, signals: StopSignals, meter: Meter, progress: TrainProgress) -> None:
        """Saves and stops the run, on all processes, if one of them got a signal."""
        signum = signals.agreed()
        if not signum:
            return
        stop = Interrupted(signum, self.state.step)
        where = f"stopped by {stop.signal.name} at step {stop.step} of {self.total_steps}"
        if not self._save(meter, progress):
            stop.code = 1
            progress.say(f"{where}, not saved: --resume goes on with the last checkpoint")
        else:
            progress.say(f"{where}, saved: go on by the same command with --resume")
        raise stop

    def _save(self, meter: Meter | None, progress: TrainProgress) -> bool:
        """Writes a checkpoint, amid an epoch if there is a meter; a full disk ends no run."""
        self.step.check()  # after a bad step, the last checkpoint is the good one
        self.state.sums = meter.sums(self.accelerator) if meter else []
        self.state.drift = self.drift.worst
        try:
            self.checkpoints.save(self.state.step, self.state.to_json())
        except CheckpointError as error:
            progress.say(f"{error}; the checkpoint before it is as it was")
            return False
        return True

    def _first_batch(self) -> tuple[Tensor, Tensor]:
        self.train_loader.set_epoch(0)
        return next(iter(self.train_loader))

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this epoch's batches, as many as are left of it and of the run."""
        first = epoch * self.steps_per_epoch
        self.train_loader.set_epoch(epoch, self.state.step - first)
        left = self.total_steps - self.state.step
        for _, batch in zip(range(left), self.train_loader, strict=False):
            yield batch

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
