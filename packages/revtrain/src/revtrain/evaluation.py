"""Accuracy of a network, over all processes; and of a finished run, again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import nn

import revdata
from revmodels import set_fused
from revtrain.capture import CapturedCall, why_not_capture
from revtrain.config import Precision
from revtrain.data import evaluation_batch, load_images, make_loader, refuse_more_classes
from revtrain.launch import make_accelerator
from revtrain.meter import Averages, Meter
from revtrain.net import to_device
from revtrain.run_folder import RunFolder


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        data: Name of the data set.
        split: `test`, or `val` for a run with held-out validation images.
        accuracy: In 0..1.
        loss: Mean cross-entropy, without label smoothing.
        images: Number of images.
    """

    data: str
    split: str
    accuracy: float
    loss: float
    images: int


class Evaluator:
    """Measures the accuracy of a prepared network, again and again while it is trained.

    On CUDA the forward pass becomes a CUDA graph, which goes with the weights as they change.

    Args:
        model: The network, without the wrapper of a distributed one.
        accelerator: Gathers the averages.
        graph: Whether to make a CUDA graph where that can be done.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, *, graph: bool = True) -> None:
        self._model = model
        self._accelerator = accelerator
        self._forward = CapturedCall(
            lambda x: (model(x),),
            accelerator.device,
            enabled=graph and why_not_capture(model) is None,
        )

    @property
    def peak_bytes(self) -> int:
        """The most bytes allocated while the graph was captured; its replays use as many."""
        return self._forward.peak_bytes

    @torch.no_grad()
    def __call__(
        self, loader: revdata.Loader, after_batch: Callable[[], None] = lambda: None
    ) -> Averages:
        """Runs over a loader; every process takes its slice, all get the averages.

        All processes call `after_batch` equally often.
        """
        was_training = self._model.training
        self._model.eval()
        meter = Meter(self._accelerator.device)
        for x, labels in loader:
            if len(labels):  # of a batch smaller than the number of processes, some get nothing
                (logits,) = self._forward(x)
                meter.update(F.cross_entropy(logits, labels), logits, labels)
            after_batch()
        self._model.train(was_training)
        return meter.read(self._accelerator)


def evaluate(
    run: str | Path,
    *,
    data: str | None = None,
    data_dir: Path | None = None,
    cpu: bool = False,
    mixed_precision: Precision | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluates the weights of a finished run, as training did at its end.

    Args:
        run: The run folder.
        data: Another data set than the run's.
        data_dir: Folder of the data; by default the one that the run was given.
        cpu: Whether to evaluate on the CPU even where there is an accelerator.
        mixed_precision: `no`, `bf16` or `fp16`; by default that of the run, but float32 on a CPU
            for a run on another device, because few CPUs compute quickly in half precision.
        progress: Whether to show a bar on stderr, if that is a terminal.

    Returns:
        The accuracy on the test images (or the validation images, if the run held them out).

    Raises:
        FileNotFoundError: The folder holds no finished run, or there are no data.
        ValueError: A file is damaged, or the data have more classes than the network has outputs,
            or another number of channels.
    """
    folder = RunFolder(Path(run))
    config = folder.read_config()
    chosen: Mapping[str, Any] = config["config"]
    spec, state = folder.read_weights()
    data = data or chosen["data"]
    split = "val" if chosen["val"] else "test"
    images = load_images(
        data,
        split,
        data_dir=data_dir or (Path(chosen["data_dir"]) if chosen["data_dir"] else None),
        verify=chosen["verify"],
    )
    refuse_more_classes(images, spec.num_classes)
    if images.images.shape[1] != spec.in_channels:
        raise ValueError(
            f"{data} has images of {images.images.shape[1]} channels, but the network of {run} "
            f"takes {spec.in_channels}"
        )
    cpu = cpu or chosen["cpu"]
    trained_on = config["hardware"]
    if mixed_precision is None:
        slow = trained_on["device"] != "cpu" and (cpu or not torch.accelerator.is_available())
        mixed_precision = "no" if slow else trained_on["mixed_precision"]
    accelerator = make_accelerator(cpu=cpu, mixed_precision=mixed_precision)
    model = spec.build()
    model.load_state_dict(state)
    # In the layout of training: another one has other kernels, which round in other ways.
    model = accelerator.prepare_model(to_device(model, accelerator.device), evaluation_mode=True)
    # And by the same kernels; see TrainStep.
    captured = chosen["graph"] and trained_on["processes"] == 1
    set_fused(model, captured and why_not_capture(model) is None)
    parts = trained_on["processes"] * trained_on["accumulate"]
    batch = evaluation_batch(config["recipe"]["batch_size"], parts, accelerator)
    loader = make_loader(images, batch, accelerator, kind=chosen["loader"])
    console = Console(stderr=True)
    quiet = not (progress and console.is_terminal and accelerator.is_main_process)
    shown: Any = track(loader, "evaluating", console=console, transient=True, disable=quiet)
    averages = Evaluator(model, accelerator)(shown)
    return Evaluation(data, split, averages.accuracy, averages.loss, averages.images)
