"""Damaged checkpoints are named and passed over; a full disk damages none."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from runs import assert_same_run, checkpoints
from tiny import TINY, as_flags

import revtrain
from revtrain.manifest import DamagedError, check_manifest
from revtrain.trainer import Trainer


def cut(folder):
    file = folder / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("")


def forge_the_manifest(folder):
    (folder / "manifest.json").write_text('{"files": [1, 2]}')


def list_nothing(folder):
    (folder / "manifest.json").write_text('{"run": null, "files": {}}')


def take_it_from_another_run(folder):
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "run": "another"}))


DAMAGES = {
    "missing file": lambda folder: (folder / "random_states_0.pkl").unlink(),
    "size": cut,
    "checksum": flip_a_bit,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "unreadable manifest": empty_the_manifest,
    "unreadable manifest, of other content": forge_the_manifest,
    "unreadable manifest, without files": list_nothing,
    "another run": take_it_from_another_run,
}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A whole run, and the same stopped after its first epoch, with checkpoints of steps 4 and 6.

    Trains both once, and copies the other for each test.
    """
    root = tmp_path_factory.mktemp("halves")
    options = {**TINY, "epochs": 1, "save_every": 2}
    revtrain.train(revtrain.TrainConfig(**options, out=root / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", None)  # a TypeError stands for the process's end
        with pytest.raises(TypeError):
            revtrain.train(revtrain.TrainConfig(**options, out=root / "half"))

    def stopped(out):
        shutil.copytree(root / "half", out)
        return options

    return root / "whole", stopped


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(halves, tmp_path, capsys, kind):
    whole, stopped = halves
    out = tmp_path / "run"
    options = stopped(out)
    older, newest = checkpoints(out)
    assert (older.name, newest.name) == ("step-00000004", "step-00000006")
    run = json.loads((out / "config.json").read_text())["run"]
    check_manifest(newest, run)
    DAMAGES[kind](newest)
    with pytest.raises(DamagedError) as damaged:
        check_manifest(newest, run)
    assert damaged.value.kind == kind.partition(",")[0]
    capsys.readouterr()
    revtrain.train(revtrain.TrainConfig(**options, out=out, resume=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"{newest} is damaged ({damaged.value.kind}): ")
    assert lines[0].endswith("; it is passed over")
    assert lines[1] == "going on after step 4 of 7"
    assert_same_run(out, whole)
    for path in checkpoints(out):
        check_manifest(path)


def test_no_whole_checkpoint_is_an_error(halves, command, tmp_path):
    _, stopped = halves
    out = tmp_path / "run"
    options = stopped(out)
    for path in checkpoints(out):
        flip_a_bit(path)
    words = ["train", *as_flags(options), "--out", out, "--resume"]
    status, _, err = command(*words)
    assert status == 2
    assert "holds no whole checkpoint: replace the run by --fresh" in err
    assert err.count("checksum") == 2
    assert len(checkpoints(out)) == 2


needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")


@pytest.fixture
def files_of_at_most():
    """Lets no file of this process grow beyond some bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@needs_limits
def test_a_file_that_cannot_grow(halves, tmp_path, capsys, files_of_at_most):
    """Weights fit in no file: the run goes on, and says at each save what is wrong."""
    whole, stopped = halves
    out = tmp_path / "run"
    options = stopped(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    files_of_at_most(10_000)
    with pytest.raises(OSError, match="File too large"):
        revtrain.train(revtrain.TrainConfig(**options, out=out, resume=True))
    err = capsys.readouterr().err
    assert "step-00000007" in err
    assert "the checkpoint before it is as it was" in err
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= {
        *(out / name for name in ("config.json", "metrics.jsonl")),
    }
    files_of_at_most(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    revtrain.train(revtrain.TrainConfig(**options, out=out, resume=True))
    assert_same_run(out, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=240k"):
        pytest.skip("mounting a file system needs root")
    yield folder, lambda size: mount("remount", f"size={size}")
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(command, plain, small_disk):
    folder, resize = small_disk
    words = ["train", *as_flags(TINY), "--out", folder / "run"]
    status, _, err = command(*words)
    assert status == 1
    # Those of the untrained net and of one epoch fit, some 70 and 110 kB, and no third one.
    assert "cannot save" in err
    assert "the checkpoint before it is as it was" in err
    assert "No space left on device" in err
    assert err.splitlines()[-1].endswith("make room, then go on by the same command with --resume")
    left = checkpoints(folder / "run")
    assert [path.name for path in left] == ["step-00000000", "step-00000007"]
    for path in left:
        check_manifest(path)
    assert not list(folder.rglob("*.partial"))
    assert resize("10M")
    status, _, err = command(*words, "--resume")
    assert status == 0, err
    assert_same_run(folder / "run", plain.run_folder)


def test_a_disk_that_was_full_before(command, small_disk):
    """Nothing is lost yet, so the run does not begin."""
    folder, resize = small_disk
    assert resize("30k")
    words = ["train", *as_flags(TINY), "--out", folder / "run"]
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "cannot save" in err
    assert "step-00000000" in err
    assert "make room" in err


def test_a_folder_that_cannot_be_written(command, small_disk):
    folder, _ = small_disk
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for out in (folder, folder / "deep" / "run"):
        status, _, err = command("train", *as_flags(TINY), "--out", out)
        assert status == 2
        assert err == f"error: {folder} cannot be written to: choose another run folder by --out\n"
