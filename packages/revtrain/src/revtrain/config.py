"""What a user chooses of a run. The command line's flags are the fields of this class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from revtrain.recipe import Recipe, load_recipe, refuse_unknown_key

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that defines a training run; `revtrain.train` takes it.

    Raises:
        ValueError: A value is out of range, or no recipe has this name; the message names the
            field. The names of the network and the data set are checked where they are loaded.
        FileNotFoundError: The recipe's file does not exist.

    Example:
        >>> config = TrainConfig(data="cifar10", recipe="paper", epochs=2)
        >>> config.run_folder.as_posix()
        'runs/cifar10-revnet38-paper-seed0'
        >>> config.resolved_recipe.steps, config.resolved_recipe.epochs
        (None, 2)
    """

    data: str = "digits"
    """Data set: digits (8x8, needs no download), cifar10 or cifar100."""
    model: str = "revnet38"
    """Network: revnet38, revnet110, revnet164 (reversible), resnet32, resnet110 or resnet164."""
    recipe: str | None = None
    """Hyperparameters: digits, cifar10, cifar100, fast (60 epochs), paper (80,000 steps, as
    published), or the path of a TOML file. Default: the data set's own."""
    epochs: int | None = None
    """Passes over the training images, instead of the recipe's."""
    batch_size: int | None = None
    """Images per step over all processes together, instead of the recipe's."""
    lr: float | None = None
    """Learning rate (or its peak), instead of the recipe's."""
    overrides: Annotated[Mapping[str, Any], Parameter(parse=False)] = field(default_factory=dict)
    """Other values instead of the recipe's, by key. On the command line each is a flag of its
    own."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    blocks: tuple[int, int, int] | None = None
    """Blocks in each of the three stages, instead of the network's own."""
    channels: tuple[int, int, int, int] | None = None
    """Channels of the stem and the three stages, instead of the network's own."""
    num_classes: int | None = None
    """Outputs of the network. Default: the classes of the data set."""
    stored: bool = False
    """Store activations as plain PyTorch does, instead of recomputing them. Same results."""
    recompute: bool = False
    """Keep less: run what cannot be reversed (stem, blocks at which the shape changes, head) again
    in the backward pass. Same results. For the reversible networks."""
    val: bool = False
    """Hold the validation images out of training and report on them; the test images stay
    unseen. For choosing a recipe."""
    loader: Literal["device", "torch"] = "device"
    """Who makes the batches: device keeps all images on the training device and is the faster;
    torch uses torch.utils.data.DataLoader and torchvision's transforms."""
    mixed_precision: Precision | None = None
    """Precision inside of the network; weights and streams stay float32. Default: what `accelerate
    config` or `accelerate launch` says, else no. On NVIDIA GPUs convolutions in float32 use TF32,
    as is PyTorch's default."""
    graph: Annotated[bool, Parameter(negative="--no-graph")] = True
    """On one NVIDIA GPU, make one CUDA graph of the training step: the same results up to rounding,
    up to six times faster. --no-graph launches it from Python, as is done wherever a graph cannot
    be made."""
    accumulate: int | None = None
    """Parts that each batch goes through the network in, one after the other, where it is too large
    for the device. The batch stays as large; batch normalization sees its parts. Default: what the
    environment variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS says, else 1."""
    cpu: bool = False
    """Train on the CPU even where there is an accelerator."""
    data_dir: Path | None = None
    """Folder of the data, or the path of an official archive. Default: the environment variable
    REVDATA_DIR, else a cache folder."""
    download: Annotated[bool | None, Parameter(negative="--no-download")] = None
    """Download the data set if its files are not there. This is the default where neither
    --data-dir nor REVDATA_DIR names a folder, and where --mirror is given."""
    mirror: str | None = None
    """URL or path of a folder to download from, instead of the data set's publisher. Default: the
    environment variable REVDATA_MIRROR."""
    verify: Annotated[bool, Parameter(negative="--no-verify")] = True
    """Compare the data's checksums. --no-verify reads repackaged files."""
    out: Path | None = None
    """Run folder. Default: runs/DATA-MODEL-RECIPE-seedSEED."""
    fresh: bool = False
    """Replace the run that the run folder holds."""
    resume: bool = False
    """Go on with the run that the run folder holds, to the same result as if it had not been
    stopped; start it if there is none."""
    save_every: int | None = None
    """Steps between two checkpoints. Default: the steps of an epoch."""
    drift_every: int | None = None
    """Steps between two measurements of how far reconstructed activations are from the true ones;
    the worst of an epoch is its drift in metrics.jsonl. A measured step takes the memory of stored
    activations; results are the same. For the reversible networks. Default: no measurement."""
    drift_bound: float | None = None
    """Stop with an error where the drift is larger: the norm of the difference over that of the
    true activations. Default: go on."""
    deterministic: bool = False
    """Use only kernels that give the same bits each time, on a GPU too. Some are slower."""
    log_with: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    """Send the metrics to TensorBoard, wandb or another of Accelerate's trackers as well, by name.
    metrics.jsonl is always written."""
    memory: Annotated[bool, Parameter(negative="--no-memory")] = True
    """At the end, measure activation memory and time per step against stored activations, over
    depth. For the reversible networks."""

    def __post_init__(self) -> None:
        if self.recipe is None:
            object.__setattr__(self, "recipe", self.data)
        for name in ("num_classes", "save_every", "accumulate", "drift_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} (={value}) must be at least 1")
        _check_drift_bound(self.drift_bound, self.drift_every)
        if self.resume and self.fresh:
            raise ValueError("resume and fresh: give one of them")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed (={self.seed}) must be at least 0 and below 2**32")
        for name, value, choices in (
            ("loader", self.loader, ("device", "torch")),
            ("mixed_precision", self.mixed_precision, (None, *get_args(Precision))),
        ):
            if value not in choices:
                listed = ", ".join(str(choice) for choice in choices if choice)
                raise ValueError(f"{name} (={value!r}) must be one of {listed}")
        if self.log_with:
            from revtrain.tracking import check_trackers  # noqa: PLC0415

            check_trackers(self.log_with)
        # A wrong recipe or override is an error here, not at its first use.
        self.resolved_recipe  # noqa: B018

    @property
    def resolved_recipe(self) -> Recipe:
        """The recipe with this configuration's overrides."""
        assert self.recipe is not None
        values = dict(self.overrides)
        for key in ("epochs", "batch_size", "lr"):
            if getattr(self, key) is not None:
                values[key] = getattr(self, key)
        for key in values:
            refuse_unknown_key(key)
        # One length replaces the other; who gives both is told so.
        if "steps" in values or "epochs" in values:
            values = {"steps": None, "epochs": None, **values}
        return replace(load_recipe(self.recipe), **values)

    @property
    def run_folder(self) -> Path:
        """Where the run's files go."""
        if self.out is not None:
            return Path(self.out)
        assert self.recipe is not None
        recipe = Path(self.recipe).stem if self.recipe.endswith(".toml") else self.recipe
        return Path("runs") / f"{self.data}-{self.model}-{recipe}-seed{self.seed}"


def _check_drift_bound(bound: float | None, every: int | None) -> None:
    if bound is None:
        return
    if not 0 <= bound < math.inf:  # NaN is not
        raise ValueError(f"drift_bound (={bound}) must be at least 0, and finite")
    if every is None:
        raise ValueError(f"drift_bound (={bound}) needs a measurement: give drift_every, too")
