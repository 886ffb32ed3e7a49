"""No process outlives its launcher.

`accelerate launch` of one process dies of SIGTERM without telling the process that it has started,
and any launcher may be killed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.5
# For a step and a checkpoint. Who is stuck longer waits for a process that is gone.
_SECONDS_OF_GRACE = 60.0
_STATUS = 128 + signal.SIGTERM

_watch: threading.Thread | None = None


def end_with_launcher() -> None:
    """Sends this process SIGTERM when its launcher is gone, and ends it if that does not.

    Does nothing where there is no launcher: a run that a shell has started may outlive it.
    """
    global _watch  # noqa: PLW0603 - a process has one parent
    if os.name != "posix" or not _is_launched() or (_watch and _watch.is_alive()):
        return
    _watch = threading.Thread(target=_wait_for_end, args=(os.getppid(),), daemon=True)
    _watch.start()


def _is_launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _lost_already(launcher: int) -> bool:
    """Whether the launcher died while this process was still importing torch: then init adopted it.

    In a container the launcher itself may be process 1.
    """
    try:
        command = Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False
    words = (b"python", b"accelerate", b"torchrun")
    return launcher == 1 and not any(word in command for word in words)


def _wait_for_end(launcher: int) -> None:
    while os.getppid() == launcher and not _lost_already(launcher):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_OF_GRACE)
    os._exit(_STATUS)
