"""Two processes with a process group, that work for one."""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conformance.adapters import CannotAskError
from conformance.questions import RemoteError, WrongError, first_line

WORLD = 2
# Its processes are forked from one that has imported torch and done nothing: a start takes little.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch"])

Work = Callable[..., None]


class Ranks:
    """Two processes of one group, until one of them fails.

    Args:
        timeout: Seconds that a piece of work may take.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        store = str(Path(self._folder.name, "store"))
        self._members = []
        for rank in range(WORLD):
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(target=_serve, args=(there, rank, store), daemon=True)
            process.start()
            there.close()
            self._members.append((process, here))

    def run(self, work: Work, *arguments: Any) -> None:
        """Runs `work(rank, *arguments)` in both processes.

        Raises:
            WrongError: What one of them raised.
            CannotAskError: Likewise.
            RemoteError: For any other error, or the end of a process.
        """
        for _, connection in self._members:
            connection.send((work, arguments))
        results = [self._result(process, connection) for process, connection in self._members]
        for result in results:
            if result is not None:
                raise result

    def _result(self, process: Any, connection: Connection) -> Exception | None:
        try:
            if not connection.poll(self._timeout):
                return RemoteError(f"no answer from a process in {self._timeout:.0f} s")
            found: Exception | None = connection.recv()
        except (EOFError, ConnectionError):
            process.join(5)
            return RemoteError(f"a process ended with exit code {process.exitcode}")
        return found

    def close(self) -> None:
        """Ends both processes."""
        for process, connection in self._members:
            connection.close()
            process.kill()
            process.join()
        self._folder.cleanup()


_ranks: Ranks | None = None


def on_two_processes(work: Work, *arguments: Any) -> None:
    """Runs `work(rank, *arguments)` in two processes, which are kept for the next call."""
    global _ranks  # noqa: PLW0603 - starting them is what takes the time
    if not (dist.is_available() and dist.is_gloo_available()):
        raise CannotAskError("this torch has no gloo")
    if _ranks is None:
        _ranks = Ranks()
        atexit.register(_close)
    try:
        _ranks.run(work, *arguments)
    except CannotAskError:
        raise
    except Exception:
        _close()  # who failed alone has left the other waiting
        raise


def _close() -> None:
    global _ranks  # noqa: PLW0603
    if _ranks is not None:
        _ranks.close()
        atexit.unregister(_close)
    _ranks = None


def _serve(connection: Connection, rank: int, store: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend = "gloo"  # on one GPU, too, which NCCL refuses
    if torch.cuda.device_count() >= WORLD:
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=dt.timedelta(seconds=30),
    )
    with contextlib.suppress(EOFError):
        while True:
            work, arguments = connection.recv()
            connection.send(_attempt(work, rank, arguments))


def _attempt(work: Work, rank: int, arguments: tuple[Any, ...]) -> Exception | None:
    torch.manual_seed(0)
    try:
        work(rank, *arguments)
    except (WrongError, CannotAskError) as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever a library raises is its answer
        return RemoteError(first_line(error))
    return None
