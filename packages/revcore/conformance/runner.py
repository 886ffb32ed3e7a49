"""Asks each question in a process of its own, which may crash or never end."""

from __future__ import annotations

import itertools
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from conformance.cases import QUESTIONS
from conformance.catalog import ADAPTERS
from conformance.questions import Answer, ask, first_line
from conformance.ranks import PROCESSES


class Job(NamedTuple):
    """One question to one adapter."""

    adapter: str
    case: str
    device: str


class _Running(NamedTuple):
    job: Job
    process: Any
    connection: Connection
    deadline: float


def run_all(jobs: Sequence[Job], at_once: int, timeout: float) -> Iterator[tuple[Job, Answer]]:
    """Asks all questions, and yields the answers as they come.

    Where there are several GPUs the processes take turns on them, each with as many as its question
    may use.

    Args:
        jobs: The questions.
        at_once: How many processes run at a time.
        timeout: Seconds after which a process is ended.
    """
    # What most cases would import by themselves, and what takes longest.
    PROCESSES.set_forkserver_preload(["torch", "torch.distributed.fsdp"])
    waiting, running = deque(jobs), list[_Running]()
    gpus = _gpus()
    turn = itertools.cycle(range(max(1, len(gpus))))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job, first = waiting.popleft(), next(turn)
                own = (gpus[first:] + gpus[:first])[: QUESTIONS[job.case].gpus]
                running.append(_start(job, timeout, ",".join(own) or None))
            soonest = min(each.deadline for each in running)
            wait([each.connection for each in running], max(soonest - time.monotonic(), 0))
            for each in list(running):
                late = time.monotonic() > each.deadline
                if each.connection.poll() or late:
                    running.remove(each)
                    yield each.job, _answer(each, timeout)
    finally:
        for each in running:
            each.process.kill()


def _gpus() -> list[str]:
    """Returns what may stand in `CUDA_VISIBLE_DEVICES`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = ",".join(map(str, range(torch.cuda.device_count())))
    return [*filter(None, visible.split(","))]


def _start(job: Job, timeout: float, gpus: str | None) -> _Running:
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_work, args=(job, there, gpus))
    process.start()
    there.close()
    return _Running(job, process, here, time.monotonic() + timeout)


def _answer(running: _Running, timeout: float) -> Answer:
    process, connection = running.process, running.connection
    try:
        if not connection.poll():
            process.kill()
            return Answer("crash", f"no answer within {timeout:.0f} s")
        answer: Answer = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Answer("crash", name)
    finally:
        connection.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    return answer


def _work(job: Job, connection: Connection, gpus: str | None) -> None:
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # read when CUDA starts, which it has not yet
    # Its own torch has had no call yet, so that one case cannot change what another sees.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    try:
        answer = ask(QUESTIONS[job.case], ADAPTERS[job.adapter], torch.device(job.device))
    except Exception as error:  # noqa: BLE001 - no library is to blame for it
        answer = Answer("-", f"plain autograd fails here: {first_line(error)}")
    connection.send(answer)
    connection.close()
