"""Kills tiny training runs at random moments and asks whether anything was lost.

Each run is killed, resumed, killed again, and at last left in peace; then its weights, optimizer,
schedule, random states and metrics must be, bit for bit, those of a run that nobody disturbed.

Processes are forked from this one, which has imported everything: a life takes a second, not the
ten that importing torch takes. What launchers do, the tests of revtrain ask of a few real ones.

    python benchmarks/chaos.py --kills 300
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import mmap
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads that a fork would lose
os.environ["ACCELERATE_USE_CPU"] = "true"

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "packages" / "revtrain" / "tests"))

from runs import assert_same_run, checkpoints  # noqa: E402
from test_checkpoints import DAMAGES  # noqa: E402

import revtrain.cli  # noqa: E402
import revtrain.commands  # noqa: E402 - here, or each life would import it
from revtrain.checkpoints import Checkpoints  # noqa: E402
from revtrain.config import TrainConfig  # noqa: E402
from revtrain.files import write_json  # noqa: E402
from revtrain.meter import Meter  # noqa: E402
from revtrain.provenance import provenance  # noqa: E402
from revtrain.signals import StopSignals  # noqa: E402
from revtrain.step import TrainStep  # noqa: E402
from revtrain.trainer import Trainer  # noqa: E402

OPTIONS: dict[str, Any] = {
    "data": "digits",
    "blocks": (2, 2, 2),
    "channels": (4, 8, 8, 8),
    "epochs": 3,
    "batch_size": 200,
    "save_every": 3,
    "memory": False,
}
STEPS = 21
PHASES = ("start", "training", "saving", "evaluation", "finishing")
# The longest that a life may take; one that hangs is a loss.
SECONDS = 120.0
SECONDS_OF_GRACE = 10.0
KILLS_PER_RUN = 5


class Life:
    """The processes of a run between a start and its end."""

    def __init__(self, out: Path, processes: int, log: Path) -> None:
        self.phases = mmap.mmap(-1, processes)  # one byte a process, shared with it
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [self._fork(rank, processes, port, out, log) for rank in range(processes)]
        self.statuses: dict[int, int] = {}
        self.failed_at: float | None = None

    def _fork(self, rank: int, processes: int, port: int, out: Path, log: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if processes > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(processes),
                    LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            self._mark(TrainStep, "__call__", rank, 1)
            self._mark(Checkpoints, "save", rank, 2)
            self._mark(Trainer, "_evaluate", rank, 3)
            self._mark(StopSignals, "__exit__", rank, 4)
            words = ["--resume", "--cpu", "--out", str(out), "--no-memory"]
            for name, value in OPTIONS.items():
                if name != "memory":
                    values = value if isinstance(value, tuple) else (value,)
                    words += [f"--{name.replace('_', '-')}", *map(str, values)]
            sys.argv = ["revtrain", "train", *words]
            revtrain.cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001 - the fork must not go on as its parent
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _mark(self, owner: type, name: str, rank: int, phase: int) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def marked(*arguments: Any, **options: Any) -> Any:
            before, self.phases[rank] = self.phases[rank], phase
            try:
                return original(*arguments, **options)
            finally:
                # Between two steps is training, too; after the loop all is finishing.
                self.phases[rank] = phase if phase in (1, 4) else before

        setattr(owner, name, marked)

    def ended(self) -> bool:
        """Looks who has ended; returns whether all have."""
        for pid in self.pids:
            if pid not in self.statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def _end_the_others(self) -> None:
        """Does what torchrun does when one has failed: SIGTERM, and later SIGKILL."""
        now = time.monotonic()
        if self.failed_at is None:
            self.failed_at = now
            signum = signal.SIGTERM
        elif now - self.failed_at > SECONDS_OF_GRACE:
            signum = signal.SIGKILL
        else:
            return
        for pid in self.pids:
            self.send(pid, signum)

    def send(self, pid: int, signum: int) -> None:
        if pid not in self.statuses:
            os.kill(pid, signum)

    def wait(self, condition: Callable[[], bool] = lambda: False) -> bool:
        """Waits for a condition; returns False if all processes ended before."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if self.ended():
                return False
            if time.monotonic() > deadline:
                for pid in self.pids:
                    self.send(pid, signal.SIGKILL)
                raise TimeoutError("a process hangs")
            if any(self.statuses.values()):
                self._end_the_others()
            time.sleep(0.0005)
        return True


def wait_for_moment(life: Life, chance: random.Random) -> str | None:
    """Waits for a random moment; returns the phase then, or None if the run ended before."""
    target = chance.choice(("any", *PHASES))
    if target in ("any", "start"):
        if target == "any" and not life.wait(lambda: life.phases[0] > 0):
            return None
        delay = chance.uniform(0, 0.6)
    else:
        for _ in range(chance.randrange(3) + 1):  # this phase for the first to the third time
            if not life.wait(lambda: PHASES[life.phases[0]] != target):
                return None
            if not life.wait(lambda: PHASES[life.phases[0]] == target):
                return None
        delay = chance.uniform(0, 0.02)
    until = time.monotonic() + delay
    if not life.wait(lambda: time.monotonic() >= until):
        return None
    return PHASES[life.phases[0]]


def disturb(
    out: Path, processes: int, log: Path, chance: random.Random
) -> tuple[str, str, str] | None:
    """Starts a run or goes on with it, and kills it; returns how, where and what came of it."""
    life = Life(out, processes, log)
    how = chance.choice(("SIGKILL", "SIGTERM"))
    phase = wait_for_moment(life, chance)
    if phase is None or life.ended():
        if any(life.statuses.values()):
            raise AssertionError(f"a run failed by itself: {life.statuses}")
        return None
    victims = chance.choice((life.pids, [chance.choice(life.pids)]))
    for pid in victims:
        life.send(pid, getattr(signal, how))
    life.wait()
    statuses = set(life.statuses.values())
    if 143 in statuses and statuses <= {143, -signal.SIGTERM}:
        # Nobody exits before all have saved; who was on its way then may be hurried.
        came = "saved and stopped"
    elif statuses == {0}:
        came = "finished"
    elif how == "SIGKILL" or phase in ("start", "finishing"):
        came = "ended at once"  # the others by an error: their connection is closed
    elif checkpoints(out)[-1].name == f"step-{STEPS:08}":
        came = "ended after the last save"
    else:
        raise AssertionError(f"{how} in {phase} gave the statuses {life.statuses}")
    return how, phase, came


def undisturbed(out: Path, processes: int, log: Path) -> None:
    life = Life(out, processes, log)
    life.wait()
    if any(life.statuses.values()):
        raise AssertionError(f"statuses {life.statuses}: {log.read_text()[-2000:]}")


def measure_seconds(folder: Path, model: str) -> dict[str, Any]:
    """Times saving and loading of a full network, in a process of its own."""
    reader, writer = os.pipe()
    if not os.fork():
        status = 1
        try:
            config = TrainConfig(data="digits", model=model, cpu=True, out=folder / model)
            trainer = Trainer(config)
            x, labels = next(iter(trainer.train_loader))
            trainer.step(x[:2], labels[:2], Meter(x.device))
            saving, loading = [], []
            for step in range(7):
                started = time.perf_counter()
                trainer.checkpoints.save(step, trainer.state.to_json())
                saved = time.perf_counter()
                path = trainer.checkpoints.newest()
                assert path is not None
                trainer.checkpoints.load(path)
                saving.append(saved - started)
                loading.append(time.perf_counter() - saved)
            size = sum(file.stat().st_size for file in path.iterdir())
            result = {
                "model": model,
                "parameters": trainer.parameters,
                "checkpoint_bytes": size,
                "save_seconds": round(statistics.median(saving), 4),
                "verify_and_load_seconds": round(statistics.median(loading), 4),
            }
            text = json.dumps({"seconds": result, "provenance": provenance(trainer.accelerator)})
            os.write(writer, text.encode())
            status = 0
        except BaseException:  # noqa: BLE001 - as above
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        found: dict[str, Any] = json.loads(file.read())
    os.wait()
    return found


def try_damages(folder: Path, whole: Path, log: Path) -> list[dict[str, str]]:
    """Damages the newest checkpoint in each way; it must be named, and the run end as ever."""
    tried = []
    for kind, damage in DAMAGES.items():
        out = folder / "damaged"
        shutil.rmtree(out, ignore_errors=True)
        life = Life(out, 1, log)
        # Before the damaged one there must be one that is not of the untrained net.
        life.wait(lambda out=out: any(path.name == "step-00000006" for path in checkpoints(out)))
        life.send(life.pids[0], signal.SIGKILL)
        life.wait()
        newest = checkpoints(out)[-1]
        damage(newest)
        told = folder / "told"
        told.write_text("")
        undisturbed(out, 1, told)
        line = next(line for line in told.read_text().splitlines() if "is damaged" in line)
        assert line.startswith(f"{newest} is damaged ({kind.partition(',')[0]})"), line
        assert_same_run(out, whole)
        tried.append({"kind": kind, "said": line.replace(str(newest), newest.name)})
    return tried


def run_chaos(kills: int, seed: int, seconds: float, folder: Path) -> dict[str, Any]:
    chance = random.Random(seed)
    log = folder / "log"
    log.write_text("")
    wholes = {}
    for processes in (1, 2):
        wholes[processes] = folder / f"whole{processes}"
        undisturbed(wholes[processes], processes, log)
    started = time.monotonic()
    counts: collections.Counter[tuple[int, str, str, str]] = collections.Counter()
    runs = lost = 0
    while sum(counts.values()) < kills and time.monotonic() - started < seconds:
        processes, out = chance.choice((1, 1, 2)), folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        log.write_text("")
        hits: collections.Counter[tuple[int, str, str, str]] = collections.Counter()
        try:
            while sum(hits.values()) < min(KILLS_PER_RUN, kills - sum(counts.values())):
                hit = disturb(out, processes, log, chance)
                if hit is None:
                    break
                hits[(processes, *hit)] += 1
            undisturbed(out, processes, log)
            assert_same_run(out, wholes[processes])
        except (AssertionError, TimeoutError) as error:
            lost += 1
            kept = folder.parent / f"lost-{runs}"
            shutil.copytree(out, kept, dirs_exist_ok=True)
            shutil.copy(log, kept / "log")
            print(f"LOST {dict(hits)}: {error!r}, see {kept}", file=sys.stderr, flush=True)
        runs += 1
        counts += hits
        print(f"\r{sum(counts.values())} kills, {runs} runs, {lost} lost", end="", flush=True)
    print()
    names = ("processes", "how", "where", "then")
    return {
        "kills": sum(counts.values()),
        "runs": runs,
        "lost": lost,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "run": {**OPTIONS, "steps": STEPS},
        "hits": [
            {**dict(zip(names, key, strict=True)), "kills": count}
            for key, count in sorted(counts.items())
        ],
        "damages": try_damages(folder, wholes[1], log),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop killing after so long")
    default = ROOT / "benchmarks" / "results" / "chaos.json"
    parser.add_argument("--output", type=Path, default=default)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        timed = [measure_seconds(folder, model) for model in ("revnet38", "revnet164")]
        result = run_chaos(chosen.kills, chosen.seed, chosen.seconds, folder)
    record = {
        **timed[0]["provenance"],
        **result,
        "checkpoints": [entry["seconds"] for entry in timed],
    }
    write_json(chosen.output, record)
    print(f"{result['kills']} kills, {result['lost']} runs lost: {chosen.output}")
    if result["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
