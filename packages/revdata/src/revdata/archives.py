"""Where a data set's files come from: a folder, an official archive, or a download of it.

An archive is never unpacked to disk: it is whole and verified, or it is not there. Every file is
read once, and what is verified are the bytes that are then used.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from revdata.download import fetch
from revdata.errors import DamagedDataError, MissingDataError


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        url: Where its publisher keeps it.
        sha256: Checksum of the archive.
        folder: The folder inside of it, which torchvision leaves beside it when it unpacks.
        md5: Checksum of each file in that folder, by name.
    """

    url: str
    sha256: str
    folder: str
    md5: Mapping[str, str]

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


def default_root() -> Path:
    """Returns the folder of all data: `REVDATA_DIR`, or `revdata` in the user's cache.

    The cache is `XDG_CACHE_HOME`, or `~/.cache` where that is not set.
    """
    if folder := os.environ.get("REVDATA_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "revdata"


def read_files(
    archive: Archive, root: Path, *, verify: bool, download: bool, mirror: str | None
) -> Iterator[tuple[str, bytes]]:
    """Yields the name and content of each of an archive's data files, in any order.

    Takes the first that is there: `root` itself if it is an archive, the unpacked folder in
    `root`, the archive in `root`, and if `download` is set the archive fetched into `root`.

    Args:
        archive: What to look for.
        root: Folder that holds the files, or path of the archive.
        verify: Whether to refuse files whose checksums are not the official ones. A download is
            verified in any case.
        download: Whether to fetch the archive if it is not there.
        mirror: URL or path of a folder to fetch it from instead of its publisher; None for the
            environment variable `REVDATA_MIRROR`, if it is set.

    Raises:
        MissingDataError: There are no files and none may be fetched, or fetching failed.
        DamagedDataError: A file was cut short or changed, or the mirror holds another.
    """
    folder, packed = root / archive.folder, root / archive.filename
    if root.is_file():
        return _read_archive(archive, root, verify)
    missing = [name for name in archive.md5 if not (folder / name).is_file()]
    if not missing:
        return _read_folder(archive, folder, verify)
    if not packed.is_file():
        if not download:
            lack = f"{folder} lacks {', '.join(missing)}" if folder.is_dir() else f"no {folder}"
            raise MissingDataError(
                f"{lack} and no {packed}: set REVDATA_DIR (or root) to the folder that holds one "
                "of them, or allow the download (download=True)"
            )
        fetch(_url(archive, mirror), packed, archive.sha256)
    return _read_archive(archive, packed, verify)


def _read_folder(archive: Archive, folder: Path, verify: bool) -> Iterator[tuple[str, bytes]]:
    for name, md5 in archive.md5.items():
        content = _read(folder / name)
        if verify:
            found = hashlib.md5(content, usedforsecurity=False).hexdigest()
            _compare(folder / name, len(content), f"MD5 {found}", f"MD5 {md5}")
        yield name, content


def _read_archive(archive: Archive, path: Path, verify: bool) -> Iterator[tuple[str, bytes]]:
    packed = _read(path)
    if verify:
        found = hashlib.sha256(packed).hexdigest()
        _compare(path, len(packed), f"SHA-256 {found}", f"SHA-256 {archive.sha256}")
    wanted = {f"{archive.folder}/{name}": name for name in archive.md5}
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
            for member in tar:
                name = wanted.pop(member.name, None)
                content = tar.extractfile(member) if name else None
                if name and content:
                    yield name, content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DamagedDataError(
            f"{path} is damaged ({error}): delete it and download it again (download=True)"
        ) from error
    if wanted:
        raise DamagedDataError(
            f"{path} lacks {', '.join(wanted)}: it is not the archive of this data set"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingDataError(f"cannot read {path}: {error.strerror}") from error


def _compare(path: Path, size: int, found: str, official: str) -> None:
    if found != official:
        raise DamagedDataError(
            f"{path} was cut short or changed ({size:,} bytes, {found} instead of {official}): "
            "delete it and download it again (download=True), or if it was repackaged on purpose "
            "do not verify it (verify=False)"
        )


def _url(archive: Archive, mirror: str | None) -> str:
    """Returns where to download from; a mirror may be a folder of this machine."""
    mirror = mirror or os.environ.get("REVDATA_MIRROR")
    if not mirror:
        return archive.url
    if "://" not in mirror:
        mirror = Path(mirror).absolute().as_uri()
    return f"{mirror.rstrip('/')}/{archive.filename}"
