"""Trains the cells of the results table, one by one, and goes on where it stopped.

    python benchmarks/cells.py --nets revnet38 resnet32 --data cifar10 --seeds 0 1 2

A cell is a network, a data set, a recipe and a seed: one `revtrain train` in a process of its own,
timed from the start of that process to its end. What it leaves (configuration, commit, versions,
hardware, curve, times, memory) goes into a folder of `--results`; weights are kept of revnet38
alone, of seed 0 with the data set's own recipe. The environment variable REVDATA_DIR names the
folder of the data.

A cell whose folder has a summary is done and is passed over; one that failed leaves its last words
there, and is tried again. Ctrl-C and SIGTERM let the run save a checkpoint, from which it goes on
next time; its time from start to end is then unknown (null). Arguments after `--` go to revtrain as
they are, and what is trained in another way needs a `--label`.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from revtrain.files import read_json, write_json
from revtrain.run_folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "cells"
NETS = ("resnet32", "revnet38", "resnet110", "revnet110", "resnet164", "revnet164")
_KEPT = ("config.json", "metrics.jsonl", "summary.json")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Cell:
    """One run."""

    net: str
    data: str
    recipe: str
    seed: int
    label: str

    @property
    def name(self) -> str:
        parts = [self.data, self.net, Path(self.recipe).stem, f"seed{self.seed}", self.label]
        return "-".join(part for part in parts if part)

    @property
    def keeps_weights(self) -> bool:
        own = self.recipe == self.data and not self.label
        return own and self.net == "revnet38" and self.seed == 0

    def command(self, arguments: argparse.Namespace, folder: Path) -> list[str]:
        words = ["-m", "revtrain", "train", "--model", self.net, "--data", self.data]
        words += ["--recipe", self.recipe, "--seed", str(self.seed), "--no-memory"]
        # An unfinished run goes on where this script was stopped.
        run = RunFolder(folder)
        unfinished = run.started and not run.finished
        words += ["--out", str(folder), "--resume" if unfinished else "--fresh"]
        if arguments.precision:
            words += ["--mixed-precision", arguments.precision]
        if arguments.no_verify and self.data == "cifar100":
            words += ["--no-verify"]
        return [sys.executable, *words, *arguments.more]


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    cells = [
        Cell(net, data, arguments.recipe or data, seed, arguments.label)
        for seed, data, net in itertools.product(arguments.seeds, arguments.data, arguments.nets)
    ]
    left = [cell for cell in cells if not (arguments.results / cell.name / _KEPT[-1]).exists()]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are done", flush=True)
    failed = 0
    for position, cell in enumerate(left):
        spent = time.perf_counter() - started
        if spent > arguments.budget_seconds:
            print(f"{spent:.0f} s are spent: {len(left) - position} cells are left", flush=True)
            break
        failed += not train(cell, arguments)
    sys.exit(1 if failed else 0)


def parse() -> argparse.Namespace:
    own, more = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, more = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS, metavar="NET")
    parser.add_argument("--data", nargs="+", default=["cifar10", "cifar100"])
    parser.add_argument("--recipe", help="a name, or a TOML file; without it each data set's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"])
    parser.add_argument(
        "--no-verify", action="store_true", help="read repackaged files of CIFAR-100"
    )
    parser.add_argument("--label", default="", help="added to the name, as a word of what differs")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "cells")
    arguments = parser.parse_args(own)
    arguments.more = more
    if arguments.results.resolve() == arguments.runs.resolve():
        parser.error(f"--results and --runs (={arguments.runs}) must be two folders")
    if more and not arguments.label and set(more) != {"--download"}:
        parser.error(f"what is trained with {shlex.join(more)} needs a --label, a word of it")
    return arguments


def train(cell: Cell, arguments: argparse.Namespace) -> bool:
    """Trains a cell and keeps its records; tells whether it went well."""
    folder, kept = arguments.runs / cell.name, arguments.results / cell.name
    command = cell.command(arguments, folder)
    print(f"{cell.name}: {shlex.join(command[1:])}", flush=True)
    kept.mkdir(parents=True, exist_ok=True)
    log = kept / "output.txt"
    started = time.perf_counter()
    status = run(command, log)
    seconds = time.perf_counter() - started
    last_words = log.read_text(encoding="utf-8").splitlines()[-20:]
    log.unlink()
    if status or not (folder / _KEPT[-1]).exists():
        number = len(list(kept.glob("failure-*.json"))) + 1
        record = {"status": status, "wall_seconds": seconds, "output": last_words}
        write_json(kept / f"failure-{number}.json", record)
        print(f"{cell.name}: failed, {last_words[-1] if last_words else ''}", flush=True)
        return False
    names = [*_KEPT[:-1]]
    if cell.keeps_weights:
        names.append("model.safetensors")
    for name in names:
        shutil.copyfile(folder / name, kept / name)
    # Nobody has timed the processes that were stopped.
    resumed = "resumed" in read_json(folder / "config.json")
    # Last, because it marks the cell as done.
    summary = read_json(folder / _KEPT[-1]) | {"wall_seconds": None if resumed else seconds}
    write_json(kept / _KEPT[-1], summary)
    if not cell.keeps_weights:
        (folder / "model.safetensors").unlink()
    accuracy = next(summary[key] for key in ("test_accuracy", "val_accuracy") if key in summary)
    print(f"{cell.name}: {accuracy:.2%} in {seconds:.0f} s", flush=True)
    return True


def run(command: list[str], log: Path) -> int:
    """Runs a command and returns its status; what ends this script ends the command first."""
    told: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        told.append(number)
        for child in children:
            child.terminate()

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        with log.open("w", encoding="utf-8") as output:
            # A session of its own, so that a terminal's Ctrl-C does not come to it a second time.
            children.append(
                subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        if told:  # before there was a child
            children[0].terminate()
        status = children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        log.unlink()
        print("stopped; the same command goes on with it", flush=True)
        sys.exit(128 + told[0])
    return status


if __name__ == "__main__":
    main()
