"""How the command line ends where something is wrong: one line on stderr, and a status."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

# How an option that an error of revdata names to its Python callers is spelled here.
_FLAGS = {
    "set REVDATA_DIR (or root)": "set REVDATA_DIR (or --data-dir)",
    "download=True": "--download",
    "verify=False": "--no-verify",
    "name a mirror": "name a mirror (--mirror)",
    "name another mirror": "name another mirror (--mirror)",
}


def end_with(error: Exception, status: int) -> NoReturn:
    """Prints an error in one line and exits.

    Every process prints its own: the launcher kills the others as soon as one has exited.
    """
    message = " ".join(str(error).split())
    for option, flag in _FLAGS.items():
        message = message.replace(option, flag)
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
