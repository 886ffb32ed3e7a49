"""Drift is measured in a run without changing it, and past a bound stops it."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, checkpoints, metrics, same, state
from test_step import DEVICES, STEPS, Run
from tiny import TINY, as_flags, launch_two
from torch import nn

import revtrain
from revcore import track_drift
from revtrain.drift import DriftWatch
from revtrain.step import TrainStep

PAST = {"drift_every": 3, "drift_bound": 1e-12}


def drift_of(folder):
    return [record["drift"] for record in metrics(folder)]


def test_measuring_is_logged_and_changes_nothing(train, plain, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    train(out="measured", drift_every=3, drift_bound=1e-3, log_with=("tensorboard",))
    plain, measured = plain.run_folder, tmp_path / "measured"
    assert all(0 < drift < 1e-4 for drift in drift_of(measured))
    events = event_accumulator.EventAccumulator(str(measured / "logs" / "revtrain"))
    events.Reload()
    logged = [event.value for event in events.Scalars("drift")]
    assert logged == pytest.approx(drift_of(measured))
    one, other = (state(checkpoints(folder)[-1]) for folder in (plain, measured))
    del one["progress"], other["progress"]
    assert same(one, other)
    records = metrics(measured)
    for record in records:
        del record["drift"]
    assert records == metrics(plain)


def test_the_epoch_has_the_worst_of_its_steps_or_none(train, tmp_path):
    train(out="each", drift_every=1)
    train(out="few", drift_every=7)
    train(out="rare", drift_every=10)
    each, few, rare = (drift_of(tmp_path / out) for out in ("each", "few", "rare"))
    assert all(worst >= one for worst, one in zip(each, few, strict=True))
    assert rare[0] is None
    assert 0 < rare[1] <= each[1]


def test_past_the_bound_the_run_stops_and_goes_on_from_before(command, train, plain, tmp_path):
    words = ["train", *as_flags({**TINY, **PAST, "save_every": 2}), "--out", tmp_path / "run"]
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "at step 3, on rank 0, the streams before branch 'stages." in line
    for word in ("drift_bound (=1e-12)", "float32", "keep_input", "FixedPointCoupling"):
        assert word in line
    assert "Traceback" not in err
    assert "The last checkpoint is of an earlier step" in line
    saved = [path.name for path in checkpoints(tmp_path / "run")]
    assert saved == ["step-00000000", "step-00000002"]
    train(resume=True)
    assert_same_run(tmp_path / "run", plain.run_folder)


def test_the_error_has_what_it_says_and_a_checkpoint_behind_it(train, tmp_path):
    with pytest.raises(revtrain.DriftError) as caught:
        train(**PAST)
    # Before the first save of its time: that of the untrained net.
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000000"]
    error = caught.value
    assert error.step == 3
    assert f"{error.name!r} are off by {error.error:.2g}" in str(error)
    assert error.name.startswith("stages.")


def test_a_stopped_run_remembers_the_drift_of_its_epoch(train, tmp_path, monkeypatch):
    train(out="whole", drift_every=3)
    call, taken = TrainStep.__call__, 0

    def stop(*arguments):
        nonlocal taken
        call(*arguments)
        taken += 1
        if taken == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(TrainStep, "__call__", stop)
    with pytest.raises(revtrain.Interrupted):
        train(drift_every=3)
    monkeypatch.undo()
    progress = json.loads((checkpoints(tmp_path / "run")[-1] / "progress.json").read_text())
    assert progress["drift"] > 0
    train(drift_every=3, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("options", [{"stored": True}, {"model": "resnet32"}], ids=str)
def test_nothing_to_measure_is_refused(command, tmp_path, options):
    words = as_flags({**TINY, **options, "drift_every": 3})
    status, _, err = command("train", *words, "--out", tmp_path / "run")
    assert status == 2
    assert "drift_every (=3) compares reconstructed activations" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", DEVICES)
def test_steps_between_replays_give_the_same_bits(device, monkeypatch):
    """Measured steps are launched from Python, before and after a graph was captured."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    losses, states, errors = [], [], []
    for measured in ((), (2, STEPS - 2)):
        run = Run(device)
        losses.append([])
        for step in range(STEPS):
            if step in measured:
                with track_drift() as drift:
                    losses[-1].append(run.take(*run.batch()))
                errors.append(drift.worst(run.net).error)
            else:
                losses[-1].append(run.take(*run.batch()))
        assert run.step.captured is (device == "cuda")
        states.append(run.state())
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *states))
    assert len(errors) == 2
    assert all(0 < error < 1e-3 for error in errors)


def watch(run, **options):
    return DriftWatch(run.net, run.step, run.accelerator, **options)


def test_a_bad_step_is_no_drift():
    run = Run("cpu")
    x, labels = run.batch()
    with (
        pytest.raises(revtrain.NonFiniteLossError, match="the images"),
        watch(run, every=1, bound=None).around(1),
    ):
        run.take(x * math.nan, labels)


class Forgets(nn.Module):
    """Has an inverse that is none."""

    def forward(self, x):
        return 2 * x

    def inverse(self, y):
        return y * math.inf


def test_what_is_not_finite_is_past_any_bound():
    run = Run("cpu", change=lambda net: net.stages[1].chain.append(Forgets()))
    drift = watch(run, every=1, bound=None)
    # The gradients of blocks before it would be NaN, too: look at the error alone.
    run.step.check = lambda: None
    run.step._guard.bad_steps = lambda: 0
    with pytest.raises(revtrain.DriftError, match=r"stages.1.chain"), drift.around(1):
        run.take(*run.batch())


ONE_RANK = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from test_step import Run
from revtrain.drift import DriftError, DriftWatch
from revtrain.net import unwrap

class Shifts(nn.Module):
    shift = 0.1 if os.environ["RANK"] == "1" else 0.0

    def forward(self, x):
        return x.clone()

    def inverse(self, y):
        return y + self.shift

run = Run("cpu", change=lambda net: net.stages[1].chain.append(Shifts()))
net = unwrap(run.net, run.accelerator)
try:
    with DriftWatch(net, run.step, run.accelerator, every=1, bound=1e-3).around(1):
        run.take(*run.batch())
except DriftError as error:
    sys.stdout.write(f"{error.name} {error}\\n")  # one write, which the other rank cannot part
# Together, and at once: gloo's threads do not always survive an exit with DDP still there.
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


def test_drift_of_one_process_stops_all(tmp_path):
    script = tmp_path / "one_rank.py"
    script.write_text(ONE_RANK)
    done = launch_two(script, Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.splitlines()
    assert one == other
    assert "at step 1, on rank 1, the streams before branch 'stages." in one
