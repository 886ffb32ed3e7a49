"""The benchmarks run, in small, and their records say what they should."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._functorch import config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ("--cpu", "--blocks", "2", "2", "2", "--channels", "4", "4", "8", "8")


def run(script, *words, cwd):
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def run_here(monkeypatch, tmp_path, capsys):
    """Runs a script in this process, which has imported torch; returns status and stdout."""
    flags, threads = torch.backends.cudnn, torch.get_num_threads()
    monkeypatch.setattr(flags, "deterministic", flags.deterministic)
    monkeypatch.setattr(flags, "benchmark", flags.benchmark)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        status = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
            except SystemExit as stop:
                status = stop.code
        return status, capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def test_step_compares_all_ways(run_here, tmp_path):
    output = tmp_path / "step.json"
    options = ("--batch-size", 4, "--image-size", 8, "--seconds", 1, "--precision", "no")
    options += ("--output", output)
    assert run_here("step.py", *SMALL, "--model", "revnet110", *options)[0] == 0
    record = json.loads(output.read_text())
    rows = {row["way"]: row for row in record["rows"]}
    for way in ("stored", "revcore", "checkpoint by block", "checkpoint in sqrt segments"):
        assert rows[way]["error"] is None
        assert rows[way]["step_ms"] > 0
        assert rows[way]["peak_bytes"] >= rows[way]["kept_bytes"] > 0
    assert rows["revcore"]["kept_bytes"] < rows["stored"]["kept_bytes"]
    for way in ("MemCNN", "RevTorch", "RevLib"):  # where they are not installed, that is said
        assert rows[way]["step_ms"] or "is not installed" in rows[way]["error"]
    assert record["block_modes"]["revcore"]["stages.1.chain.0"] == "reversed"
    assert record["block_modes"]["stored"]["stages.1.chain.0"] == "stored"


def test_cells_go_on_where_they_stopped(run_here, tmp_path):
    recipe = tmp_path / "short.toml"
    recipe.write_text("batch_size = 700\nsteps = 2\nlr = 0.1\nschedule = 'one-cycle'\n")
    words = ("--recipe", recipe, "--results", tmp_path / "results", "--runs", tmp_path / "runs")
    words += ("--data", "digits", "nowhere", "--nets", "resnet32")
    # Among the records it would count as one of the net itself.
    assert run_here("cells.py", *words, "--", *SMALL)[0] == 2
    words += ("--label", "small")
    status, out = run_here("cells.py", *words, "--", *SMALL)
    assert status == 1
    assert out.count("--fresh") == 2
    done, failed = (
        tmp_path / "results" / f"{name}-resnet32-short-seed0-small" for name in words[7:9]
    )
    summary = json.loads((done / "summary.json").read_text())
    assert summary["wall_seconds"] > summary["seconds"] > 0
    kept = {"config.json", "metrics.jsonl", "summary.json"}
    assert {file.name for file in done.iterdir()} == kept
    last_words = json.loads((failed / "failure-1.json").read_text())["output"]
    assert "unknown data set 'nowhere'" in last_words[-1]
    _, out = run_here("cells.py", *words, "--budget-seconds", 0, "--", *SMALL)
    assert "1 of 2 cells are done" in out
    assert "1 cells are left" in out  # no time at all: none is begun

    # Stopped before its end: it goes on, and nobody knows the time of the first part.
    for folder in (done, tmp_path / "runs" / done.name):
        (folder / "summary.json").unlink()
    words = [word for word in words if word != "nowhere"]
    status, out = run_here("cells.py", *words, "--", *SMALL)
    assert (status, out.count("--resume")) == (0, 1)
    assert json.loads((done / "summary.json").read_text())["wall_seconds"] is None


def test_fixed_point_twins_are_the_same(run_here, tmp_path):
    output = tmp_path / "twins.json"
    options = ("--data", "digits", "--recipe", "digits", "--steps", 8, "--output", output)
    assert run_here("twins.py", *SMALL, *options)[0] == 0
    record = json.loads(output.read_text())
    assert record["first_difference"] is None
    assert record["largest_weight_difference"] == 0
    assert len(set(record["losses_reversed"])) == 8


def test_numerics_knows_what_is_exact(run_here, tmp_path):
    output = tmp_path / "numerics.json"
    options = ("--depths", 2, 9, "--seeds", 1, "--output", output)
    assert run_here("numerics.py", *options)[0] == 0
    found = {(row["way"], row["depth"]): row for row in json.loads(output.read_text())["rows"]}
    for (way, _), row in found.items():
        if way.startswith("fixed point"):
            assert row["stream"] == 0
            assert row["gradient_reversed"] == row["gradient_stored"]
    assert 0 < found["additive, float32", 2]["stream"] < found["additive, bf16", 2]["stream"] < 0.1
    short, long = (found["additive, float32, bf16 branches" + end, 9] for end in (", anchors", ""))
    assert short["stream"] < long["stream"]


def test_several_processes_share_a_network_in_all_ways(tmp_path):
    output = tmp_path / "several.json"
    options = ("--cpu", "--parts", "speed", "--models", "revnet38", "--output", output)
    done = run("several_gpus.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    speed = json.loads(output.read_text())["speed"]
    ways = {(row["way"], row["processes"], row["reversing"]) for row in speed["rows"]}
    assert {("one process", 1, True), ("DDP", 2, True), ("FSDP2, each block", 2, False)} <= ways
    assert len(ways) == 2 * 8
    assert all(row["images_per_second"] > 0 for row in speed["rows"])
    for row in speed["readiness"]:  # shares of the backward pass
        assert 0 < row["ready_at"][-1] <= 1


def test_a_deep_net_learns_in_the_memory_of_a_shallow_one(run_here, tmp_path):
    output = tmp_path / "ten-thousand-cpu.json"
    options = ("--cpu", "--data", "digits", "--layers", 20, 60, "--channels", 4, 4, 8, 8)
    options += ("--batch-size", 50, "--steps", 25, "--output", output)
    assert run_here("ten_thousand.py", *options)[0] == 0
    record = json.loads(output.read_text())
    stored, shallow, deep = record["rows"]
    assert (shallow["convolutions"], deep["convolutions"]) == (21, 69)
    assert deep["kept_bytes"] == shallow["kept_bytes"] < stored["kept_bytes"]
    assert all(row["step_ms"] > 0 for row in record["rows"])
    losses = record["training"]["losses"]
    assert len(losses) == 25
    assert sum(losses[-5:]) < sum(losses[:5])


def test_memory_grows_with_the_batch(tmp_path):
    output = tmp_path / "batch.json"
    options = (*SMALL, "--gigabytes", "--batches", 4, 8, "--output", output)
    options += ("--ways", "stored", "revcore, recomputed", "RevTorch")
    done = run("batch.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text())["rows"]
    kept = {(row["way"], row.get("batch_size")): row.get("kept_bytes") for row in rows}
    for way in ("stored", "revcore, recomputed"):
        assert 1.9 < kept[way, 8] / kept[way, 4] < 2.1
    assert kept["revcore, recomputed", 8] < kept["stored", 8] / 3
    assert all(row["way"] != "RevTorch" or "error" in row or row["step_ms"] > 0 for row in rows)


@pytest.mark.parametrize("gaps", [0, 0.1])
def test_the_largest_batch_is_found(monkeypatch, gaps):
    """In as many steps as are timed; two may fit where those do not."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    largest = runpy.run_path(str(BENCHMARKS / "batch.py"))["largest"]
    for limit in (2, 5, 64, 1000, 7777):
        most = int(limit * (1 - gaps))

        def attempt(size, count, limit=limit, most=most):
            return {"batch_size": size} if size <= (limit if count == 2 else most) else None

        for start in (1, 64, 900, 20_000):
            found = largest(attempt, start)["batch_size"]
            assert found <= most < found + max(2, found / 7)
    with pytest.raises(MemoryError, match="not even a batch of 1 fits"):
        largest(lambda *_: None, 1)


def test_compiled_nets_share_no_code(monkeypatch):
    """Or the second one would get what was compiled for the budget of the first."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    ways = runpy.run_path(str(BENCHMARKS / "ways.py"))
    one, two = (ways["_of_its_own"](abs) for _ in range(2))
    assert one(-1) == two(-1) == 1
    assert one.__code__ is not two.__code__


def test_all_that_is_compiled_for_a_way_gets_its_budget(run_here, monkeypatch):
    """The step compiles once more than the count of its memory: its weights are cast before."""
    budgets = []

    def compiler(graph, _inputs):
        budgets.append(config.activation_memory_budget)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    way = "stored, compiled, budget 0.3"
    options = ("--batch-size", 4, "--image-size", 8, "--seconds", 1, "--precision", "bf16")
    status, printed = run_here("step.py", *SMALL, *options, "--ways", way)
    assert status == 0, printed
    assert budgets == [0.3] * len(budgets)
    assert len(budgets) > 1


def test_only_faster_tiles_are_written(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    conv_passes = pytest.importorskip("revmodels.conv_passes", exc_type=ImportError)
    file = tmp_path / "conv_passes.py"
    shutil.copyfile(conv_passes.__file__, file)
    monkeypatch.setattr(conv_passes, "__file__", str(file))
    tiles = runpy.run_path(str(BENCHMARKS / "tiles.py"))
    rows = [
        {"table": table, "channels": channels, "now": [2.0, ("now",)], "best": [[time, ("new",)]]}
        for table in tiles["TABLES"]
        for channels in tiles["SIDES"]
        for time in (1.0, 1.99)  # in float32 and in half precision
    ]
    tiles["write"](rows)
    assignments = [
        node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)
    ]
    written = {ast.unparse(node.targets[0]): node.value for node in assignments}
    for table in tiles["TABLES"]:
        found = ast.literal_eval(written[table])
        assert found == dict.fromkeys(tiles["SIDES"], (("new",), ("now",)))
