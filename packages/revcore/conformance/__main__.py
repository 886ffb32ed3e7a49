"""Asks every question of every scheme and library, each in a process of its own.

Usage: `python packages/revcore/conformance --output FILE.json`, and then `--render`, which writes
the tables of docs/conformance.md from the records in the folder `results` beside this file.
"""

import argparse
import datetime as dt
import os
import platform
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from conformance import report
from conformance.cases import QUESTIONS
from conformance.catalog import ADAPTERS
from conformance.questions import Answer
from conformance.runner import Job, run_all


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python packages/revcore/conformance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write a record")
    parser.add_argument(
        "--resume", action="store_true", help="ask only what the record lacks or could not ask"
    )
    parser.add_argument("--only", nargs="+", choices=[*ADAPTERS], metavar="ADAPTER")
    parser.add_argument("--case", nargs="+", choices=[*QUESTIONS], metavar="NAME")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of a case")
    parser.add_argument(
        "--check", action="store_true", help="fail unless ours answers as it should"
    )
    parser.add_argument("--render", action="store_true", help="write the tables, and ask nothing")
    arguments = parser.parse_args()
    if arguments.render:
        report.render()
        return
    if arguments.output is not None and not arguments.output.parent.is_dir():
        parser.error(f"--output (={arguments.output}) is in a folder that does not exist")

    if arguments.resume and arguments.output is None:
        parser.error("--resume needs --output, the record that lacks answers")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    jobs = [
        Job(adapter, case, arguments.device)
        # Those of two processes are the last ones and take the longest: they begin.
        for case in reversed(arguments.case or [*QUESTIONS])
        for adapter in arguments.only or ADAPTERS
    ]
    names = list(dict.fromkeys(job.adapter for job in jobs))
    answers: dict[Job, Answer] = {}
    if arguments.resume and arguments.output.exists():
        answers = known(arguments.output, record(arguments.device, names, {}))
    signal.signal(signal.SIGTERM, stop)
    try:
        left = [job for job in jobs if job not in answers]
        for job, answer in run_all(left, arguments.jobs, arguments.timeout):
            answers[job] = answer
            print(line(job, answer), flush=True)
    finally:
        if arguments.output is not None:
            report.write(arguments.output, record(arguments.device, names, answers))
    bad = [job for job, answer in answers.items() if not allowed(job, answer)]
    if arguments.check and bad:
        names_of_bad = ", ".join(f"{job.case} of {job.adapter}" for job in bad)
        sys.exit(f"ours must not answer so: {names_of_bad}")


def allowed(job: Job, answer: Answer) -> bool:
    """Tells whether `--check` lets an answer pass."""
    return not ADAPTERS[job.adapter].ours or answer.passes(QUESTIONS[job.case])


def line(job: Job, answer: Answer) -> str:
    """Returns the line that is printed for an answer."""
    error = "" if answer.error is None else f" {answer.error:.2g}"
    detail = f": {answer.detail}" if answer.detail else ""
    return f"{job.case:30} {job.adapter:22} {answer.answer}{error}{detail}"


def stop(number: int, _: object) -> None:
    """Ends the run so that what has been answered is written."""
    signal.signal(number, signal.SIG_IGN)  # it may come twice, and the second time amid writing
    sys.exit(128 + number)


def known(file: Path, now: dict[str, Any]) -> dict[Job, Answer]:
    """Returns the answers of a record, if it is of the same versions and hardware as `now`.

    Without those that could not be asked: more GPUs may have changed that.
    """
    before = report.read(file)
    for key in ("versions", "hardware", "adapters"):
        if before[key] != now[key]:
            sys.exit(f"{file} has other {key} ({before[key]}): ask all again, without --resume")
    return {
        Job(case.pop("adapter"), case.pop("case"), now["hardware"]["device"]): Answer(**case)
        for case in before["cases"]
        if case["answer"] != "-"
    }


def record(device: str, names: list[str], answers: dict[Job, Answer]) -> dict[str, Any]:
    """Returns all that is written about a run."""
    versions = {"python": platform.python_version()}
    for package in ["torch", *(ADAPTERS[name].package for name in names)]:
        versions[package] = report.version(package)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "command": shlex.join(["python", "packages/revcore/conformance", *sys.argv[1:]]),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "versions": versions,
        "hardware": {"device": device, "name": name},
        "adapters": names,
        "cases": [
            {"case": job.case, "adapter": job.adapter, **answer.as_json()}
            for job, answer in sorted(answers.items(), key=lambda item: position(item[0], names))
        ],
    }


def position(job: Job, names: list[str]) -> tuple[int, int]:
    """Returns where a job stands in a record, in whatever order the answers came."""
    return [*QUESTIONS].index(job.case), names.index(job.adapter)


if __name__ == "__main__":
    main()
