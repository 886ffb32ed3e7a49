"""What a run must know again to go on, and whether it is still the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Fields of the configuration that leave the result as it is. All others, those to come included,
# are taken to change it.
_IMMATERIAL = {
    *("data_dir", "download", "mirror", "verify"),
    *("out", "fresh", "resume", "save_every", "memory", "log_with", "recompute"),
    *("drift_every", "drift_bound"),
}
# Fields that are compared as what becomes of them: the recipe's values, the network's sizes, the
# device and its precision.
_RESOLVED = {
    *("recipe", "epochs", "batch_size", "lr", "overrides"),
    *("model", "blocks", "channels", "num_classes"),
    *("cpu", "mixed_precision", "accumulate"),
}


@dataclass
class RunState:
    """Where a training loop stands, beside what weights, optimizer and schedule hold.

    Attributes:
        step: Optimizer steps taken.
        records: The records of the epochs that are complete, their evaluation included.
        lr: Learning rate of the last step.
        seconds: Time that the present epoch has taken.
        sums: What `Meter.sums` returned in the present epoch; empty before its first step.
        drift: The worst drift of the present epoch; None if none was measured.
    """

    step: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    lr: float = 0.0
    seconds: float = 0.0
    sums: list[list[float]] = field(default_factory=list)
    drift: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)


def refuse_other_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises if two runs, as `config.json` describes them, would not give the same result.

    The number of processes may differ: it changes no sample, and results by rounding alone.

    Raises:
        ValueError: Names each field that differs, with both values.
    """
    was, now = _identity(old), _identity(new)
    different = [
        f"{name} (={now.get(name)!r}) was {was.get(name)!r}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"--resume goes on with the same run, but {'; '.join(different)}: give the same values "
            "again, or start another run by --fresh or --out"
        )


def _identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all that the result depends on, as plain JSON values."""
    config, hardware = description["config"], description["hardware"]
    identity = {
        **{name: config[name] for name in config if name not in _IMMATERIAL | _RESOLVED},
        **description["recipe"],
        **description["net"],
        "device": hardware["device"],
        "mixed_precision": hardware["mixed_precision"],
        "accumulate": hardware["accumulate"],
        "compiled_by": hardware.get("compiled_by", "no"),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain
