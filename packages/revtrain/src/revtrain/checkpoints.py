"""Checkpoints that are whole or absent: Accelerate's save_state and load_state, made safe.

`Accelerator.save_state` writes in place, deletes the oldest checkpoint before the new one is whole,
stores the weights under other names with several processes than with one, and `load_state` is
silent where it could not restore the random states. So it writes here to a folder of a temporary
name; a manifest and a rename make it a checkpoint, and only then older ones are removed.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, broadcast_object_list, gather_object
from accelerate.utils.other import load as load_file
from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors
from torch import nn

from revtrain.files import read_json, sync, write_json
from revtrain.manifest import DamagedError, check_manifest, write_manifest
from revtrain.net import unwrap

# The newest may turn out to be damaged by the disk, long after it was written.
_KEPT = 2
_PREFIX = "step-"
_WEIGHTS = "model.safetensors"
_PROGRESS = "progress.json"
# What a full disk is to Python, to torch.save and to safetensors.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class CheckpointError(Exception):
    """A checkpoint could not be written, or none of those that are there can be read."""


def _is_whole(path: Path, run: str | None) -> bool:
    try:
        check_manifest(path, run)
    except DamagedError as error:
        print(f"{error}; it is passed over", file=sys.stderr, flush=True)
        return False
    return True


class Checkpoints:
    """The checkpoints of a run; all processes call each method together.

    A checkpoint is a folder `step-00000123` with the files that `Accelerator.save_state` writes,
    `progress.json` (what the training loop wants to know again) and `manifest.json`. Several nodes
    need one folder that all of them see.

    Args:
        path: The folder of the checkpoints.
        accelerator: Has prepared model, optimizer and scheduler.

    Attributes:
        run: The name of the run, which its checkpoints hold; those of others are passed over.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.run: str | None = None
        self._accelerator = accelerator
        accelerator.register_save_state_pre_hook(self._unwrap_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, step: int, progress: Mapping[str, Any]) -> None:
        """Writes a checkpoint, then removes all but the newest two.

        Raises:
            CheckpointError: On all processes, if one of them could not write. The older
                checkpoints are as they were.
        """
        path = self.path / f"{_PREFIX}{step:08}"
        partial = self.path / f".{path.name}.partial"

        def begin() -> None:
            if self._accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write() -> None:
            self._accelerator.save_state(str(partial))

        def commit() -> None:
            if self._accelerator.is_main_process:
                self._refuse_lost_parts(partial)
                write_json(partial / _PROGRESS, progress)
                write_manifest(partial, self.run)
                # There is none of this step, unless it is damaged and was passed over.
                shutil.rmtree(path, ignore_errors=True)
                partial.replace(path)
                sync(self.path)

        for stage in (begin, write, commit):
            error = None
            try:
                stage()
            except _WRITE_ERRORS as caught:
                error = f"{type(caught).__name__}: {caught}"
            # No process goes on before all have done their part.
            errors = [text for text in gather_object([error]) if text]
            if errors:
                shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(f"cannot save {path}: {errors[0]}")
        if self._accelerator.is_main_process:
            self._prune(step)

    def newest(self) -> Path | None:
        """Returns the newest checkpoint that is whole; names those that are not, on stderr.

        Raises:
            CheckpointError: There are checkpoints, and all are damaged.
        """
        found: list[Any] = [None, None]
        if self._accelerator.is_main_process:
            found = list(self._find_newest())
        path, error = broadcast_object_list(found)
        if error is not None:
            raise CheckpointError(error)
        return None if path is None else Path(path)

    def progress(self, path: Path) -> dict[str, Any]:
        """Returns the progress that was saved."""
        progress: dict[str, Any] = read_json(path / _PROGRESS)
        return progress

    def load(self, path: Path) -> None:
        """Restores weights, optimizer, schedule, gradient scale and random states."""
        self._accelerator.load_state(str(path))
        self._restore_random_states(path)

    def _find_newest(self) -> tuple[str | None, str | None]:
        paths = sorted(self.path.glob(f"{_PREFIX}*"), reverse=True)
        for path in paths:
            if _is_whole(path, self.run):
                return str(path), None
        if paths:
            return None, f"{self.path} holds no whole checkpoint: replace the run by --fresh"
        return None, None

    def _refuse_lost_parts(self, partial: Path) -> None:
        """Raises if a process has written elsewhere."""
        for rank in range(self._accelerator.num_processes):
            if not (partial / f"{RNG_STATE_NAME}_{rank}.pkl").exists():
                raise OSError(
                    f"what process {rank} wrote is not here: several nodes need one run folder "
                    "that all of them see"
                )

    def _prune(self, step: int) -> None:
        """Removes what an interrupted save left, and all checkpoints but the newest.

        What is newer than the one just written was damaged, or the run would stand there.
        """
        newest = f"{_PREFIX}{step:08}"
        paths = sorted(self.path.glob(f"{_PREFIX}*"))
        kept = [path for path in paths if path.name <= newest][-_KEPT:]
        for path in (*paths, *self.path.glob(f".{_PREFIX}*.partial")):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _unwrap_weights(
        self, models: list[nn.Module], weights: list[dict[str, Any]], _: str
    ) -> None:
        """Names the weights as the network does, not as its wrapper for several processes."""
        for i in range(len(weights)):  # none where sharded weights have been written already
            state = unwrap(models[i], self._accelerator).state_dict()
            weights[i] = OrderedDict((name, value.contiguous()) for name, value in state.items())

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        for model in models:
            state = load_tensors(Path(folder) / _WEIGHTS)
            unwrap(model, self._accelerator).load_state_dict(state)
        models.clear()

    def _restore_random_states(self, path: Path) -> None:
        """Does again what load_state may have failed to do; it would not say so.

        A process that did not exist when the checkpoint was written takes the states of the first.
        """
        own = path / f"{RNG_STATE_NAME}_{self._accelerator.process_index}.pkl"
        states = load_file(own if own.exists() else path / f"{RNG_STATE_NAME}_0.pkl")
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])  # noqa: NPY002 - the one that is saved
        torch.set_rng_state(states["torch_manual_seed"])
        device = self._accelerator.device
        if device.type == "cuda" and "torch_cuda_manual_seed" in states:
            of_devices = states["torch_cuda_manual_seed"]
            index = device.index or 0
            torch.cuda.set_rng_state(of_devices[index if index < len(of_devices) else 0], device)
