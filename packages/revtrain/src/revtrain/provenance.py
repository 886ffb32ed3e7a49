"""What a run must record of where it ran, so that its numbers can be compared and repeated."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

_PACKAGES = ("revcore", "revmodels", "revdata", "revtrain", "torch", "torchvision", "accelerate")


def provenance(accelerator: Accelerator) -> dict[str, Any]:
    """Returns command, commit, date, versions and hardware, as plain JSON values.

    The commit is that of the sources that run, or what the environment variable REVTRAIN_COMMIT
    says where they are no git repository; None for an installed package.
    """
    return {
        "command": _command(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(accelerator),
    }


def _command() -> str:
    program, *arguments = sys.argv
    path = Path(program)
    if path.name == "__main__.py":
        start = ["python", "-m", "revtrain"]
    elif path.suffix == ".py":
        start = ["python", Path(os.path.relpath(path)).as_posix()]
    else:
        start = [path.name]
    return shlex.join([*start, *arguments])


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        done = [
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("REVTRAIN_COMMIT")
    commit, changes = (one.stdout.strip() for one in done)
    return commit + (" with changes" if changes else "")


def _versions() -> dict[str, str | None]:
    # torch's own word tells its build as well.
    return {package: _version(package) for package in _PACKAGES} | {"torch": torch.__version__}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a source folder
        return None


def _hardware(accelerator: Accelerator) -> dict[str, Any]:
    device = accelerator.device
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "accumulate": accelerator.gradient_accumulation_steps,
        "compiled_by": accelerator.state.dynamo_plugin.backend.value.lower(),
    }
    if device.type == "cuda":
        hardware["device_name"] = torch.cuda.get_device_name(device)
        hardware["cuda"] = torch.version.cuda
        hardware["cudnn"] = torch.backends.cudnn.version()
    return hardware


def _processor() -> str:
    """Returns the processor's name, which platform.processor() does not know on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
