"""Whole files are read wherever they are; anything else is refused in one line."""

import io
import pickle
import tarfile

import pytest

import revdata
from revdata import DamagedDataError, DataError, MissingDataError


def first(small):
    """Name of the first file of training images."""
    return "data_batch_1" if small.name == "cifar10" else "train"


def refuse(error, small, root, **options):
    """Loads, checks that this is refused in one line, and returns the line."""
    with pytest.raises(error) as caught:
        revdata.load(small.name, "train", root=root, **options)
    assert isinstance(caught.value, DataError)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_folder_archive_and_path_of_an_archive_hold_the_same(official, tmp_path):
    official.unpack_into(tmp_path / "folder")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / official.archive).write_bytes(official.packed)
    (tmp_path / "renamed").write_bytes(official.packed)
    sets = [
        revdata.load(official.name, "train", root=tmp_path / place)
        for place in ("folder", "archive", "renamed")
    ]
    for other in sets[1:]:
        assert other.images.equal(sets[0].images)
        assert other.labels.equal(sets[0].labels)


def test_the_environment_names_the_folder(official, tmp_path, monkeypatch):
    official.unpack_into(tmp_path)
    monkeypatch.setenv("REVDATA_DIR", str(tmp_path))
    assert len(revdata.load(official.name, "train"))


def test_the_default_folder_is_in_the_users_cache(official, tmp_path, monkeypatch):
    monkeypatch.delenv("REVDATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingDataError, match=str(tmp_path / "revdata")):
        revdata.load(official.name, "train")


def test_a_folder_without_the_files_is_refused(official, tmp_path):
    message = refuse(MissingDataError, official, tmp_path)
    assert official.folder in message
    assert official.archive in message
    assert "REVDATA_DIR" in message


def test_a_missing_file_is_named(official, tmp_path):
    (official.unpack_into(tmp_path) / first(official)).unlink()
    assert f"lacks {first(official)}" in refuse(MissingDataError, official, tmp_path)


def test_an_archive_stands_in_for_an_incomplete_folder(official, tmp_path):
    (official.unpack_into(tmp_path) / first(official)).unlink()
    (tmp_path / official.archive).write_bytes(official.packed)
    assert len(revdata.load(official.name, "train", root=tmp_path))


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_cut_short_is_refused(official, tmp_path, verify):
    file = official.unpack_into(tmp_path) / first(official)
    file.write_bytes(file.read_bytes()[:-1000])
    message = refuse(DamagedDataError, official, tmp_path, verify=verify)
    assert first(official) in message
    assert "cut short" in message


def test_a_changed_byte_is_refused(official, tmp_path):
    file = official.unpack_into(tmp_path) / first(official)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    message = refuse(DamagedDataError, official, tmp_path)
    assert str(file) in message
    assert "verify=False" in message


def test_repackaged_files_are_read_only_without_verification(small, tmp_path):
    small.unpack_into(tmp_path)
    assert "MD5" in refuse(DamagedDataError, small, tmp_path)
    assert len(revdata.load(small.name, "train", root=tmp_path, verify=False))


def test_a_repackaged_archive_is_read_only_without_verification(small, tmp_path):
    (tmp_path / small.archive).write_bytes(small.packed)
    assert "SHA-256" in refuse(DamagedDataError, small, tmp_path)
    assert len(revdata.load(small.name, "train", root=tmp_path, verify=False))


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.99])
def test_an_archive_cut_short_is_refused(official, tmp_path, keep):
    content = official.packed[: int(keep * len(official.packed))]
    (tmp_path / official.archive).write_bytes(content)
    assert "cut short" in refuse(DamagedDataError, official, tmp_path)
    assert "damaged" in refuse(DamagedDataError, official, tmp_path, verify=False)


def test_an_archive_of_something_else_is_refused(official, tmp_path):
    with tarfile.open(tmp_path / official.archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("holiday.jpg"), io.BytesIO())
    assert "lacks" in refuse(DamagedDataError, official, tmp_path, verify=False)


@pytest.mark.parametrize("record", [{}, {"labels": [1], "fine_labels": [1], "data": "text"}])
def test_pickles_of_something_else_are_refused(official, tmp_path, record):
    file = official.unpack_into(tmp_path) / first(official)
    file.write_bytes(pickle.dumps(record, protocol=2))
    assert "not CIFAR's" in refuse(DamagedDataError, official, tmp_path, verify=False)


def test_a_download_comes_from_the_mirror_and_stays(official, tmp_path):
    mirror, root = tmp_path / "mirror", tmp_path / "new" / "root"
    mirror.mkdir()
    (mirror / official.archive).write_bytes(official.packed)
    options = {"root": root, "download": True, "mirror": mirror.as_uri()}
    downloaded = revdata.load(official.name, "train", **options)
    assert sorted(file.name for file in root.iterdir()) == sorted(
        [official.archive, f".{official.archive}.lock"]
    )
    (mirror / official.archive).unlink()
    again = revdata.load(official.name, "train", **options)
    assert again.images.equal(downloaded.images)


def test_the_environment_names_a_mirror_which_may_be_a_path(official, tmp_path, monkeypatch):
    (tmp_path / official.archive).write_bytes(official.packed)
    monkeypatch.setenv("REVDATA_MIRROR", str(tmp_path))
    assert len(revdata.load(official.name, "train", root=tmp_path / "root", download=True))


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_download_leaves_nothing_behind(official, tmp_path, verify):
    mirror, root = tmp_path / "mirror", tmp_path / "root"
    mirror.mkdir()
    (mirror / official.archive).write_bytes(official.packed[:-1])
    options = {"download": True, "mirror": mirror.as_uri(), "verify": verify}
    assert "name another mirror" in refuse(DamagedDataError, official, root, **options)
    assert [file.name for file in root.iterdir()] == [f".{official.archive}.lock"]


def test_an_unreachable_mirror_is_refused(official, tmp_path):
    options = {"download": True, "mirror": (tmp_path / "nowhere").as_uri()}
    assert "cannot download" in refuse(MissingDataError, official, tmp_path, **options)
