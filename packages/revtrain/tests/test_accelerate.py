"""The habits of Accelerate's users: its launcher, its configuration files, its variables."""

import json
import signal

import pytest
from runs import assert_same_run, metrics
from safetensors.torch import load_file
from tiny import TINY, as_flags, launch

import revtrain
from revtrain.step import TrainStep

# Of a run whose settings are looked at, and nothing else.
SHORT = {**TINY, "blocks": (1, 1, 1), "epochs": 1}


def test_accelerate_launch(tmp_path):
    out = tmp_path / "run"
    done = launch(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1),
        *("--mixed_precision", "bf16", "-m", "revtrain", "train"),
        *(*as_flags(SHORT), "--out", out),
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["hardware"]["mixed_precision"] == "bf16"


def test_a_config_file_of_accelerate(tmp_path):
    """As `accelerate config` writes it, after its questions for one process on the CPU."""
    file, out = tmp_path / "accelerate.yaml", tmp_path / "run"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: 'NO'\n"
        "downcast_bf16: 'no'\nenable_cpu_affinity: false\nmachine_rank: 0\n"
        "main_training_function: main\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: 1\n"
        "rdzv_backend: static\nsame_network: true\ntpu_env: []\ntpu_use_cluster: false\n"
        "tpu_use_sudo: false\nuse_cpu: true\n"
    )
    words = [word for word in as_flags(SHORT) if word != "--cpu"]
    done = launch(
        *("-m", "accelerate.commands.launch", "--config_file", file),
        *("-m", "revtrain", "train", *words, "--out", out),
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2",
    )
    assert done.returncode == 0, done.stderr
    hardware = json.loads((out / "config.json").read_text())["hardware"]
    assert hardware["device"] == "cpu"
    assert (hardware["mixed_precision"], hardware["accumulate"]) == ("bf16", 2)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_other_ways_than_ours_are_refused(command, monkeypatch, tmp_path, variable, name):
    """As `accelerate launch --config_file` sets them; on the CPU Accelerate would say nothing."""
    monkeypatch.setenv(variable, "true")
    status, _, err = command("train", *as_flags(TINY), "--out", tmp_path / "run")
    assert status == 2
    assert err.startswith(f"error: Accelerate is configured for {name} ({variable}=true)")
    assert "distributed_type: MULTI_GPU" in err
    assert not (tmp_path / "run").exists()


def test_a_flag_wins_over_the_configuration(command, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    words = ["train", *as_flags(SHORT), "--out"]
    for flags, precision in (((), "bf16"), (("--mixed-precision", "no"), "no")):
        out = tmp_path / precision
        assert command(*words, out, *flags)[0] == 0
        hardware = json.loads((out / "config.json").read_text())["hardware"]
        assert hardware["mixed_precision"] == precision


def test_a_configuration_that_compiles(train, monkeypatch, tmp_path):
    """`dynamo_config` of a configuration file: weights keep their names, and a run resumes."""
    small = {"blocks": (1, 1, 1)}
    train(**small, out="plain")
    # Compiled by a backend that changes nothing, and so takes no compiler.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    train(**small, out="whole")
    call, taken = TrainStep.__call__, []

    def stop(*arguments):
        call(*arguments)
        taken.append(1)
        if len(taken) == 9:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stop)
        with pytest.raises(revtrain.Interrupted):
            train(**small)
    train(**small, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["hardware"]["compiled_by"] == "eager"
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "plain"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "plain")]
    assert weights[0].keys() == weights[1].keys()
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    last = metrics(tmp_path / "run")[-1]
    assert revtrain.evaluate(tmp_path / "run").accuracy == pytest.approx(last["test_accuracy"])
    with pytest.raises(ValueError, match=r"compiled_by \(='no'\) was 'eager'"):
        train(**small, resume=True)
