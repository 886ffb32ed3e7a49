"""Bad input: one line that says what is wrong and what to do, exit status 2, no work lost."""

import shutil

import pytest
from tiny import TINY, as_flags, launch, write_small_cifar10

import revdata
import revtrain
from revtrain import run_folder
from revtrain.run_folder import RunFolder

SHORT = {**TINY, "epochs": 1}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A finished run of one epoch, which no test changes."""
    out = tmp_path_factory.mktemp("short") / "run"
    revtrain.train(revtrain.TrainConfig(**SHORT, out=out))
    return out


@pytest.fixture
def finished(short_run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(short_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--model", "revnet83"], "did you mean 'revnet38'"),
        (["train", "--data", "cifar11"], "did you mean 'cifar10'"),
        (["train", "--recipe", "papre"], "did you mean 'paper'"),
        (["train", "--model", "RevNet-38"], "did you mean 'revnet38'"),
        (["train", "--data", "CIFAR100"], "did you mean 'cifar100'"),
        (["train", "--momentun", "0.5"], "Did you mean"),
        (["train", "--momentum", "2"], "momentum (=2.0) must be less than 1"),
        (["train", "--schedule", "stesp"], "steps"),
        (["train", "--epochs", "1", "--steps", "1"], "exactly one"),
        (["find-batch", "--cpu", "--largest", "0"], "largest (=0)"),
        (["lits"], 'Did you mean "list"'),
        (["train", "--recipe", "absent.toml"], "absent.toml"),
        (["train", "--batch-size", "0"], "batch_size (=0) must be at least 1"),
        (["train", "--batch-size", "2000"], "1442"),
        (["train", "--batch-size", "many"], "--batch-size"),
        (["train", "--epochs", "0"], "epochs (=0) must be at least 1"),
        (["train", "--lr", "-1"], "lr (=-1.0) must be greater than 0"),
        (["train", "--seed", "-1"], "seed (=-1)"),
        (["train", "--accumulate", "0"], "accumulate (=0) must be at least 1"),
        (["train", "--accumulate", "3"], "batch_size (=100) must be a multiple of 3"),
        (["train", "--save-every", "0"], "save_every (=0) must be at least 1"),
        (["train", "--drift-every", "0"], "drift_every (=0) must be at least 1"),
        (["train", "--drift-bound", "0.1"], "drift_bound (=0.1) needs a measurement"),
        (["train", "--drift-every", "1", "--drift-bound", "inf"], "drift_bound (=inf) must be at"),
        (["train", "--recipe", "no.toml"], "recipe 'no.toml': there is no such file"),
        (["train", "--drift-every", "1", "--drift-bound", "-1"], "drift_bound (=-1.0) must be at"),
        (["train", "--num-classes", "5"], "num_classes (=5) is less than the 10 classes of digits"),
        (["train", "--num-classes", "0"], "num_classes (=0) must be at least 1"),
        (["train", "--channels", "4", "9", "8", "8"], "channels must be even"),
        (["train", "--channels", "4", "8"], "--channels"),
        (["train", "--blocks", "0", "1", "1"], "blocks must be positive"),
        (["train", "--mixed-precision", "fp61"], "fp16"),
        (["train", "--bacth-size", "5"], "Did you mean"),
        (["train", "--data", "cifar10", "--data-dir", "absent"], "--data-dir"),
        (["trian"], 'Did you mean "train"'),
        (["evaluate", "absent"], "absent holds no run"),
        (["evaluate"], "RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_and_status_two(command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    if words[0] == "train":
        words = [*words, "--cpu"]
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_no_traceback_in_a_process_of_its_own(tmp_path):
    done = launch("-m", "revtrain", "train", "--cpu", "--model", "nonet", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown model 'nonet'")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_holds_a_run(command, finished):
    before = (finished / "model.safetensors").read_bytes()
    words = ["train", *as_flags({**SHORT, "seed": 5}), "--out", finished]
    status, _, err = command(*words)
    assert status == 2
    assert "holds a run already: replace it by --fresh" in err
    assert (finished / "model.safetensors").read_bytes() == before
    # Wrong input leaves the old run alone, --fresh or not.
    assert command(*words, "--fresh", "--num-classes", "3")[0] == 2
    assert (finished / "model.safetensors").read_bytes() == before
    assert command(*words, "--fresh")[0] == 0
    assert (finished / "model.safetensors").read_bytes() != before


def test_a_file_where_the_run_folder_should_be(command, tmp_path):
    (tmp_path / "run").write_text("")
    status, _, err = command("train", *as_flags(TINY), "--out", tmp_path / "run")
    assert status == 2
    assert "is a file" in err


def test_files_that_are_of_no_run(command, tmp_path):
    mine = tmp_path / "run" / "checkpoints" / "mine.pt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    words = ["train", *as_flags(SHORT), "--out", tmp_path / "run"]
    for more in ([], ["--resume"]):
        status, _, err = command(*words, *more)
        assert status == 2
        assert "holds checkpoints and no config.json, so of no run" in err
        assert mine.read_text() == "precious"
    assert command(*words, "--fresh")[0] == 0
    assert not mine.exists()


def test_a_folder_that_another_process_trains_into(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.2)
    words = ["train", *as_flags(SHORT), "--out", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run").alone():
        status, _, err = command(*words)
        assert status == 2
        assert "another process is training into" in err
        assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]
    assert command(*words)[0] == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_finished_run_that_is_damaged(command, finished, name, content):
    file = finished / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, err = command("train", *as_flags(SHORT), "--out", finished, "--resume")
    assert status == 2
    assert f"{name} is damaged" in err.splitlines()[-1]


def test_damaged_data(command, tmp_path):
    folder = write_small_cifar10(tmp_path)
    words = ["train", *as_flags({**TINY, "data": "cifar10"}), "--data-dir", tmp_path]
    status, _, err = command(*words, "--out", tmp_path / "run")  # wrong checksums
    assert status == 2
    assert err.count("\n") == 1
    assert "do not verify it (--no-verify)" in err

    file = folder / "data_batch_3"
    file.write_bytes(file.read_bytes()[:5000])
    status, _, err = command(*words, "--no-verify", "--out", tmp_path / "run")
    assert status == 2
    assert err.count("\n") == 1
    assert "data_batch_3" in err
    assert not (tmp_path / "run").exists()


def test_labels_without_outputs(command, train, small_cifar10, tmp_path):
    train(data="cifar10", data_dir=small_cifar10, verify=False, batch_size=50, epochs=1)
    status, _, err = command("evaluate", tmp_path / "run", "--data", "digits")
    assert status == 2
    assert "channels" in err
    train(out="digits", num_classes=10, epochs=1)
    status, _, err = command("evaluate", tmp_path / "digits", "--data", "nothing")
    assert status == 2
    assert "unknown data set 'nothing'" in err


def test_more_classes_than_outputs_in_evaluation(command, finished, monkeypatch):
    wide = revdata.load("digits", "test")
    more = type(wide)(
        "more",
        "test",
        wide.images,
        wide.labels,
        (*wide.classes, "ten"),
        wide.mean,
        wide.std,
    )
    monkeypatch.setattr("revtrain.data.revdata.load", lambda *_, **__: more)
    status, _, err = command("evaluate", finished)
    assert status == 2
    assert "11 classes" in err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_runs(command, finished, name):
    file = finished / name
    file.write_bytes(file.read_bytes()[:100])
    status, _, err = command("evaluate", finished)
    assert status == 2
    assert f"{name} is damaged" in err
    file.unlink()
    status, _, err = command("evaluate", finished)
    assert status == 2
    assert name in err


@pytest.mark.parametrize(
    ("folder", "flags", "download"),
    [
        ("", [], True),
        ("somewhere", [], False),
        ("", ["--data-dir", "somewhere"], False),
        ("somewhere", ["--download"], True),
    ],
)
def test_downloads_where_no_folder_is_named(command, monkeypatch, folder, flags, download):
    asked = []

    def load(*_, **options):
        asked.append(options["download"])
        raise revdata.MissingDataError("no files")

    monkeypatch.setattr("revtrain.data.revdata.load", load)
    monkeypatch.setenv("REVDATA_DIR", folder)
    words = ["train", "--data", "cifar10", "--cpu", "--out", "no such folder"]
    status, _, err = command(*words, *flags)
    assert (status, err) == (2, "error: no files\n")
    assert asked == [download]
