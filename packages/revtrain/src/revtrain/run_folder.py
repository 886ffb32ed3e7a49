"""The files of a run, and the promise that none of them is ever half written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from revtrain.files import read_json, read_json_lines, whole_file, write_json, write_json_lines
from revtrain.net import NetSpec

# Seconds that a process may still need to end which was told to.
_PATIENCE = 5.0


class BusyError(RuntimeError):
    """Another process is training into the run folder."""


class RunFolder:
    """A folder that holds one run.

    Attributes:
        path: The folder.
        config: `config.json`: what was chosen, and where it ran. Its presence marks a run.
        metrics: `metrics.jsonl`: one line for each epoch.
        weights: `model.safetensors`: the final weights, and what the network is built from.
        summary: `summary.json`: the results.
        memory: `memory.json`: memory and time over depth.
        logs: `logs`: what trackers wrote.
        checkpoints: `checkpoints`: what the run goes on from after it was stopped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.weights = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.memory = path / "memory.json"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"

    def plots(self, name: str) -> tuple[Path, Path]:
        """Returns where a picture goes, as SVG and as PNG."""
        return self.path / f"{name}.svg", self.path / f"{name}.png"

    @property
    def started(self) -> bool:
        """Whether the folder holds a run.

        Raises:
            NotADirectoryError: There is a file of the folder's name.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file: choose another run folder by --out")
        return self.config.exists()

    @property
    def finished(self) -> bool:
        """Whether the run is complete: its summary is written last."""
        return self.summary.exists()

    def refuse_old_run(self) -> None:
        """Raises if there is a run here already.

        Raises:
            FileExistsError: The folder holds a run.
            NotADirectoryError: There is a file of the folder's name.
        """
        if self.started:
            what = "a run already:" if self.finished else "an unfinished run: go on by --resume,"
            raise FileExistsError(
                f"{self.path} holds {what} replace it by --fresh, or choose another folder by --out"
            )
        self.refuse_strangers()

    def refuse_strangers(self) -> None:
        """Raises if files would be replaced that are of no run.

        Raises:
            FileExistsError: There are files of a run's names, and no `config.json`.
        """
        ours = (self.checkpoints, self.weights, self.metrics, self.summary, self.memory)
        there = [path.name for path in ours if path.exists()]
        if there and not self.started:
            raise FileExistsError(
                f"{self.path} holds {', '.join(there)} and no {self.config.name}, so of no run: "
                "replace them by --fresh, or choose another folder by --out"
            )

    def refuse_unwritable(self) -> None:
        """Raises if no file can be written here.

        Raises:
            PermissionError: Names the folder that forbids it.
        """
        path = self.path.absolute()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(
                f"{there} cannot be written to: choose another run folder by --out"
            )

    def start(self, config: dict[str, Any]) -> None:
        """Makes the folder, removes what an old run left in it, and writes `config.json`.

        Files of other names are not touched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.started:  # else they are not of a run
            shutil.rmtree(self.logs, ignore_errors=True)
        for old in (
            *(self.config, self.metrics, self.weights, self.summary, self.memory),
            *self.plots("curve"),
            *self.plots("memory"),
        ):
            old.unlink(missing_ok=True)
        # After config.json: a checkpoint without it belongs to no run.
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        write_json(self.config, config)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from training into the folder, by a lock of the operating system.

        Raises:
            BusyError: Another one does.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise BusyError(
                f"another process is training into {self.path}: wait until it has ended, or "
                "choose another run folder by --out"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def go_on(self, step: int, where: dict[str, Any]) -> None:
        """Adds to `config.json` that, and where, the run goes on after a step."""
        config = self.read_config()
        config.setdefault("resumed", []).append({"step": step, **where})
        write_json(self.config, config)

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Writes all epochs so far; the file is small, and so it is always whole."""
        write_json_lines(self.metrics, records)

    def write_weights(self, state: dict[str, Tensor], spec: NetSpec) -> None:
        """Writes a state dict, and in its header what the network is built from."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        # One entry, because safetensors writes several in random order: equal weights, equal files.
        header = {"net": json.dumps(spec.to_json())}
        with whole_file(self.weights) as temporary:
            temporary.write_bytes(save(tensors, metadata=header))

    def read_config(self) -> dict[str, Any]:
        """Reads `config.json`.

        Raises:
            FileNotFoundError: There is no run here.
            ValueError: The file is damaged.
        """
        if not self.config.exists():
            raise FileNotFoundError(f"{self.path} holds no run (no {self.config.name} in it)")
        config = read_json(self.config)
        if not isinstance(config, dict) or not {"config", "recipe", "net"} <= config.keys():
            raise ValueError(f"{self.config} is damaged (no run's): train again with --fresh")
        return config

    def read_weights(self) -> tuple[NetSpec, dict[str, Tensor]]:
        """Reads the weights and what the network is built from.

        Raises:
            FileNotFoundError: The run has not finished.
            ValueError: The file is damaged.
        """
        if not self.weights.exists():
            raise FileNotFoundError(
                f"{self.path} holds no weights (no {self.weights.name} in it). If the run has not "
                "finished, go on with it by train --resume"
            )
        try:
            with safe_open(self.weights, framework="pt") as file:
                spec = NetSpec.from_json(json.loads(file.metadata()["net"]))
                return spec, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.weights} is damaged ({error}): train again with --fresh"
            ) from error

    def read_results(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Reads summary and metrics of a finished run.

        Raises:
            ValueError: A file is damaged.
        """
        summary = read_json(self.summary)
        if not isinstance(summary, dict) or not {"model", "epochs", "seconds"} <= summary.keys():
            raise ValueError(f"{self.summary} is damaged (no run's): train again with --fresh")
        return summary, read_json_lines(self.metrics)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes the results."""
        write_json(self.summary, summary)
