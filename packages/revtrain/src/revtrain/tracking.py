"""The metrics for TensorBoard and others, through Accelerate's trackers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from revtrain.run_folder import RunFolder

Log = Callable[[dict[str, Any]], None]


def check_trackers(names: Sequence[str]) -> None:
    """Refuses what Accelerate would pass over in silence.

    Raises:
        ValueError: There is no tracker of this name, or its library is not installed.
    """
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown log_with {name!r}: {hint}known: {', '.join(known)}")
        if name not in installed:
            raise ValueError(
                f"log_with (={name!r}) needs a library that is not installed: pip install "
                f"{name.replace('_', '-').replace('comet-ml', 'comet_ml')}, or leave it out"
            )


@contextmanager
def tracking(
    accelerator: Accelerator, names: Sequence[str], folder: RunFolder, description: dict[str, Any]
) -> Iterator[Log]:
    """Starts the trackers, gives the function that logs an epoch, and ends them.

    Args:
        accelerator: Runs them, on its main process alone.
        names: Those that `check_trackers` let pass; none is none.
        folder: The run folder; those that write files do so in its `logs`.
        description: What `config.json` holds.
    """
    if not names:
        yield lambda _: None
        return
    accelerator.log_with = list(names)
    accelerator.project_configuration.set_directories(str(folder.path))
    accelerator.project_configuration.logging_dir = str(folder.logs)
    accelerator.init_trackers("revtrain", config=_flat(description))

    def log(record: dict[str, Any]) -> None:
        values = {key: value for key, value in record.items() if isinstance(value, (int, float))}
        accelerator.log(values, step=record["step"])

    try:
        yield log
    finally:
        # Not accelerator.end_training(), which also destroys the process group, and with it the
        # barrier by which all processes end together.
        for tracker in accelerator.trackers:
            tracker.finish()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested values into what every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = value is not None and isinstance(value, (bool, int, float, str))
            flat[f"{prefix}{key}"] = value if plain else str(value)
    return flat
