"""What a run would be, without running it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from revtrain.config import TrainConfig
from revtrain.memory import activation_bytes
from revtrain.meter import Meter
from revtrain.net import unwrap
from revtrain.peak import peak_memory, reset_peak_memory
from revtrain.trainer import Trainer


@dataclass(frozen=True)
class Plan:
    """What `dry_run` found.

    Attributes:
        model: Name of the network.
        parameters: Number of its parameters.
        layers: Layers with weights along the longest path.
        images: Training images.
        batch_size: Images per step, over all processes.
        epochs: Passes over the training images, the last of which may be cut short.
        steps: Optimizer steps.
        device: Where it would run, with the number of processes.
        precision: Precision inside of the network.
        activations: What becomes of them: reversed, stored, and what is recomputed.
        activation_bytes: Bytes that the forward pass of a step leaves behind for the backward
            pass, on one process; measured by one.
        peak_activation_bytes: The most bytes alive at once in both, without weights, gradients
            and the batch.
        peak_memory_bytes: The most memory of a whole step as `metrics.jsonl` has it: all tensors
            on a GPU, the whole process on a CPU. None where nothing counts it.
        run_folder: Where the files would be.
    """

    model: str
    parameters: int
    layers: int
    images: int
    batch_size: int
    epochs: int
    steps: int
    device: str
    precision: str
    activations: str
    activation_bytes: int
    peak_activation_bytes: int
    peak_memory_bytes: int | None
    run_folder: Path


def dry_run(config: TrainConfig) -> Plan:
    """Checks a configuration as `train` does, and measures one step of it; writes nothing.

    The step is a real one, on the device, in the precision and with the batch of the run. Data that
    are not there are not downloaded.

    Args:
        config: What would be trained.

    Raises:
        ValueError, FileExistsError, revdata.DataError: As `train` does.

    Example:
        >>> from revtrain import TrainConfig
        >>> plan = dry_run(TrainConfig(blocks=(1, 1, 1), cpu=True))
        >>> plan.parameters, plan.layers, plan.steps
        (253802, 14, 280)
    """
    trainer = Trainer(replace(config, download=False))
    accelerator = trainer.accelerator
    x, labels = next(iter(trainer.train_loader))
    net = unwrap(trainer.model, accelerator).train()
    part = len(x) // accelerator.gradient_accumulation_steps  # what is in the network at once
    kept, peak = activation_bytes(net, x[:part], labels[:part], accelerator)
    net.zero_grad()
    reset_peak_memory(accelerator.device)
    trainer.step(x, labels, Meter(accelerator.device))
    return Plan(
        model=trainer.spec.model,
        parameters=trainer.parameters,
        layers=trainer.spec.architecture.layers,
        images=len(trainer.train_loader.dataset),
        batch_size=trainer.recipe.batch_size,
        epochs=trainer.epochs,
        steps=trainer.total_steps,
        device=f"{accelerator.device.type}, {accelerator.num_processes} process"
        + ("es" if accelerator.num_processes > 1 else ""),
        precision=accelerator.mixed_precision,
        activations=_describe(trainer),
        activation_bytes=kept,
        peak_activation_bytes=peak,
        peak_memory_bytes=peak_memory(accelerator.device),
        run_folder=trainer.folder.path,
    )


def _describe(trainer: Trainer) -> str:
    reverses = trainer.spec.architecture.reversible and not trainer.config.stored
    between = ", recomputed between the chains" if trainer.config.recompute else ""
    return ("reversed" if reverses else "stored") + between


def print_plan(plan: Plan) -> None:
    """Prints a plan on stdout."""
    table = Table.grid(padding=(0, 2))
    memory = (
        "unknown" if plan.peak_memory_bytes is None else f"{plan.peak_memory_bytes / 1e6:,.1f} MB"
    )
    for name, value in (
        ("network", f"{plan.model}, {plan.layers} layers, {plan.parameters:,} parameters"),
        ("length", f"{plan.steps:,} steps in {plan.epochs} epochs of {plan.images:,} images"),
        ("batch", f"{plan.batch_size} images over all processes"),
        ("device", f"{plan.device}, mixed precision {plan.precision}"),
        ("activations", plan.activations),
        ("", f"{plan.activation_bytes / 1e6:,.1f} MB kept for the backward pass"),
        ("", f"{plan.peak_activation_bytes / 1e6:,.1f} MB at the peak of a step"),
        ("peak memory", memory),
        ("run folder", f"{plan.run_folder} (nothing was written)"),
    ):
        table.add_row(name, value)
    Console(soft_wrap=True, highlight=False).print(table)
