"""The benchmarks run, in small, and their records say what they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_step_compares_all_ways(tmp_path):
    output = tmp_path / "step.json"
    options = ("--batch-size", 4, "--image-size", 8, "--seconds", 1, "--precision", "no")
    options += ("--output", output)
    done = run("step.py", *SMALL, "--model", "revnet110", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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


def test_cells_go_on_where_they_stopped(tmp_path):
    recipe = tmp_path / "short.toml"
    recipe.write_text("batch_size = 700\nsteps = 2\nlr = 0.1\nschedule = 'one-cycle'\n")
    words = ("--recipe", recipe, "--results", tmp_path / "results", "--runs", tmp_path / "runs")
    words += ("--data", "digits", "nowhere", "--nets", "resnet32")
    first = run("cells.py", *words, "--", *SMALL, cwd=tmp_path)
    assert first.returncode == 1
    done, failed = (tmp_path / "results" / f"{name}-resnet32-short-seed0" for name in words[7:9])
    summary = json.loads((done / "summary.json").read_text())
    assert summary["wall_seconds"] > summary["seconds"] > 0
    kept = {"config.json", "metrics.jsonl", "summary.json"}
    assert {file.name for file in done.iterdir()} == kept
    last_words = json.loads((failed / "failure-1.json").read_text())["output"]
    assert "unknown data set 'nowhere'" in last_words[-1]
    second = run("cells.py", *words, "--budget-seconds", 0, "--", *SMALL, cwd=tmp_path)
    assert "1 of 2 cells are done" in second.stdout
    assert "1 cells are left" in second.stdout  # no time at all: none is begun


def test_fixed_point_twins_are_the_same(tmp_path):
    output = tmp_path / "twins.json"
    options = ("--data", "digits", "--recipe", "digits", "--steps", 8, "--output", output)
    done = run("twins.py", *SMALL, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["first_difference"] is None
    assert record["largest_weight_difference"] == 0
    assert len(set(record["losses_reversed"])) == 8


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
    for row in speed["readiness"]:  # so small a net fills one bucket, at the end of the pass
        assert 0.5 < row["ready_at"][-1] <= 1
