"""A run that was stopped and resumed ends with the same bits as one that was not."""

import json
import shutil
import signal

import pytest
import torch
from runs import assert_same_run, checkpoints, metrics
from tiny import TINY, as_flags

import revtrain
from revtrain.signals import StopSignals
from revtrain.step import TrainStep
from revtrain.trainer import Trainer

# Seven steps an epoch, as in all tests with the tiny net.
STEPS = 14


class Killed(BaseException):
    """Stands for a process that is gone: nothing of the run's own cleans up after it."""


@pytest.fixture
def stop_at(monkeypatch):
    """Stops the next run after its n-th step, by a signal or as kill -9 would."""

    def arm(step, how):
        taken = 0
        original = TrainStep.__call__

        def call(self, *arguments):
            nonlocal taken
            original(self, *arguments)
            taken += 1
            if taken == step:
                monkeypatch.setattr(TrainStep, "__call__", original)
                if how == "kill":
                    raise Killed
                signal.raise_signal(how)

        monkeypatch.setattr(TrainStep, "__call__", call)

    return arm


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stopped, by its options."""
    done = {}

    def run(**options):
        key = str(options)
        if key not in done:
            out = tmp_path_factory.mktemp("whole") / "run"
            revtrain.train(revtrain.TrainConfig(**{**TINY, **options, "out": out}))
            done[key] = out
        return done[key]

    return run


@pytest.mark.parametrize("step", [1, 7, 10, 14])
def test_sigterm_at_any_step(train, stop_at, whole, tmp_path, step):
    stop_at(step, signal.SIGTERM)
    with pytest.raises(revtrain.Interrupted) as stopped:
        train()
    assert (stopped.value.code, stopped.value.step) == (143, step)
    assert not (tmp_path / "run" / "summary.json").exists()
    result = train(resume=True)
    assert_same_run(tmp_path / "run", whole())
    assert result.metrics == [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [again["step"] for again in config["resumed"]] == [step]


@pytest.mark.parametrize("moment", [(1, None), (2, None), (11, None), (11, 3)], ids=str)
def test_killed_at_any_step(train, stop_at, whole, tmp_path, moment):
    step, save_every = moment
    stop_at(step, "kill")
    with pytest.raises(Killed):
        train(save_every=save_every)
    saved = [int(path.name[5:]) for path in checkpoints(tmp_path / "run")]
    every = save_every or 7
    # The killing step itself is not saved; the untrained net is.
    assert saved == list(range(0, step, every))[-2:]
    train(resume=True, save_every=save_every)
    assert_same_run(tmp_path / "run", whole())


def test_stopped_again_and_again(train, stop_at, whole, tmp_path):
    for how in (signal.SIGTERM, signal.SIGINT, "kill", signal.SIGTERM):
        stop_at(3, how)
        with pytest.raises((revtrain.Interrupted, Killed)):
            train(resume=True)
    train(resume=True)
    assert_same_run(tmp_path / "run", whole())


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16", "epochs": 1},
        {"loader": "torch"},
        {"model": "resnet32", "recipe": "paper"},
        {"stored": True, "deterministic": True},
    ],
    ids=str,
)
def test_other_choices_resume_too(train, stop_at, whole, tmp_path, options):
    stop_at(4, signal.SIGTERM)
    with pytest.raises(revtrain.Interrupted):
        train(**options)
    train(**options, resume=True)
    assert_same_run(tmp_path / "run", whole(**options))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_may_go_on_with_less_memory(train, stop_at, whole, tmp_path):
    stop_at(4, signal.SIGTERM)
    with pytest.raises(revtrain.Interrupted):
        train()
    train(recompute=True, resume=True)
    assert_same_run(tmp_path / "run", whole())


def test_a_signal_in_evaluation(train, whole, tmp_path, monkeypatch):
    evaluate = Trainer._evaluate

    def interrupted(*arguments):
        monkeypatch.setattr(Trainer, "_evaluate", evaluate)
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(Trainer, "_evaluate", interrupted)
    with pytest.raises(revtrain.Interrupted) as stopped:
        train()
    assert stopped.value.step == 7
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(resume=True)
    assert_same_run(tmp_path / "run", whole())


def test_handlers_are_put_back(train, stop_at):
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    stop_at(1, signal.SIGINT)
    with pytest.raises(revtrain.Interrupted) as stopped:
        train()
    assert stopped.value.code == 130
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch):
    agreed = []

    def press_thrice():
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # a launcher's, of the same key
            agreed.append(signals.agreed())
            monkeypatch.setattr("revtrain.signals._SECONDS_OF_ONE_INTERRUPT", 0.0)
            signal.raise_signal(signal.SIGINT)
            agreed.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        press_thrice()
    assert agreed == [signal.SIGINT]


def test_a_signal_in_the_last_save_is_not_lost(train, whole, tmp_path, monkeypatch):
    save = Trainer._save

    def interrupted(self, *arguments):
        if self.state.step == STEPS:
            signal.raise_signal(signal.SIGINT)
        return save(self, *arguments)

    monkeypatch.setattr(Trainer, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    train(resume=True)
    assert_same_run(tmp_path / "run", whole())


def test_signals_that_are_ignored_stay_so():
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert not signals.agreed()
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("pictures")
def test_the_command_line_says_how_to_go_on(command, stop_at, whole, tmp_path):
    words = ["train", *as_flags(TINY), "--out", tmp_path / "run"]
    stop_at(5, signal.SIGINT)
    status, _, err = command(*words)
    assert status == 130
    assert (
        "stopped by SIGINT at step 5 of 14, saved: go on by the same command with --resume" in err
    )
    status, _, err = command(*words)
    assert status == 2
    assert "holds an unfinished run: go on by --resume, replace it by --fresh" in err
    status, _, err = command(*words, "--resume")
    assert status == 0, err
    assert "going on after step 5 of 14" in err
    assert_same_run(tmp_path / "run", whole())
    # A restarted job of a finished run is no error, and does nothing.
    before = (tmp_path / "run" / "summary.json").read_bytes()
    status, out, _ = command(*words, "--resume")
    assert status == 0
    assert "test accuracy" in out
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_resume_starts_where_there_is_nothing(train, whole, tmp_path):
    train(resume=True)
    assert_same_run(tmp_path / "run", whole())


def test_another_run_is_refused(command, train, stop_at, tmp_path):
    stop_at(3, signal.SIGTERM)
    with pytest.raises(revtrain.Interrupted):
        train()
    before = [path.name for path in checkpoints(tmp_path / "run")]
    other = {**TINY, "epochs": 3, "channels": (4, 8, 8, 16)}
    words = ["train", *as_flags(other), "--seed", 1, "--lr", 0.2, "--out", tmp_path / "run"]
    status, _, err = command(*words, "--resume")
    assert status == 2
    err = err.splitlines()[-1]
    for text in (
        "channels (=[4, 8, 8, 16]) was [4, 8, 8, 8]",
        "epochs (=3) was 2",
        "lr (=0.2) was 0.1",
        "seed (=1) was 0",
    ):
        assert text in err
    assert "batch_size" not in err
    assert [path.name for path in checkpoints(tmp_path / "run")] == before
    # The recipe's own value is no other one, and where files go changes nothing.
    train(resume=True, lr=0.1, recipe="digits", save_every=4)


def test_resume_and_fresh_exclude_each_other():
    with pytest.raises(ValueError, match="resume and fresh"):
        revtrain.TrainConfig(resume=True, fresh=True)


def test_fresh_forgets_the_old_checkpoints(train, stop_at, whole, tmp_path):
    train(seed=1)
    stop_at(2, "kill")
    with pytest.raises(Killed):
        train(fresh=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000000"]
    train(resume=True)
    assert_same_run(tmp_path / "run", whole())


def test_half_of_a_checkpoint_is_none(train, stop_at, whole, tmp_path):
    """What kill -9 leaves amid a save: a folder of another name, which is cleared away."""
    stop_at(9, "kill")
    with pytest.raises(Killed):
        train()
    _, newest = checkpoints(tmp_path / "run")
    partial = newest.with_name(".step-00000009.partial")
    shutil.copytree(newest, partial)
    (partial / "manifest.json").unlink()
    train(resume=True)
    assert not partial.exists()
    assert_same_run(tmp_path / "run", whole())


def test_metrics_are_those_of_the_checkpoint(train, stop_at, tmp_path):
    """A run killed between metrics and checkpoint has a line too many, until it goes on."""
    stop_at(9, "kill")
    with pytest.raises(Killed):
        train(save_every=5)
    assert len(metrics(tmp_path / "run")) == 1
    stop_at(1, "kill")
    with pytest.raises(Killed):
        train(save_every=5, resume=True)
    assert not metrics(tmp_path / "run")
