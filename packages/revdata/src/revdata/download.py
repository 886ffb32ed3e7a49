"""Downloads that go on where they stopped, once for all processes, verified or not there at all.

Bytes go to `NAME.part`, which stays when a download is interrupted, and the next attempt asks for
the rest of it, also in another process. The whole is checked by its SHA-256 and only then takes its
name. Meanwhile a lock on `.NAME.lock` is held. It is the operating system's, so a process that is
killed leaves none behind; the empty file stays, for removing it would give two processes two locks.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from revdata.errors import DamagedDataError, DataError, MissingDataError

_CHUNK = 1 << 16
# Without a single byte. A slow host sends some all the time, however long the whole takes.
_TIMEOUT_SECONDS = 60.0
# In a row that bring nothing new; the wait before the next doubles each time.
_TRIES = 5
_FIRST_WAIT_SECONDS = 1.0


class _InterruptedError(Exception):
    """The network's fault; `again` says whether it may work the next time."""

    def __init__(self, reason: object, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


def fetch(url: str, destination: Path, sha256: str) -> None:
    """Downloads a file, unless it is there; returns when it is whole and verified.

    Of several processes that call this at once one downloads, and the others wait for it.

    Args:
        url: Where it is: http, https, ftp or file.
        destination: Where it goes; its folder is made.
        sha256: Its checksum.

    Raises:
        MissingDataError: The network or the disk did not allow it. What has come is kept.
        DamagedDataError: What came is another file, and was deleted.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _alone(destination):
            if not destination.is_file():
                _fetch(url, destination, sha256)
    except DataError:
        raise
    except OSError as error:
        raise MissingDataError(
            f"cannot write {destination}: {error.strerror or error}; make room or permit it and "
            "try again, which goes on where this stopped, or set REVDATA_DIR (or root) to another "
            "folder"
        ) from error


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Holds the lock of a file, and says so where it must be waited for."""
    lock = FileLock(destination.with_name(f".{destination.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.stderr.write(f"waiting for another process to download {destination}\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, destination: Path, sha256: str) -> None:
    part = destination.with_name(f"{destination.name}.part")
    sys.stderr.write(f"downloading {url} to {destination}\n")
    patched = _receive_all(url, part)
    if patched and _sha256(part) != sha256:
        # The pieces may be of two files, or the host cannot send pieces: once more, from the start.
        part.unlink()
        _receive_all(url, part)
    found, size = _sha256(part), part.stat().st_size
    if found != sha256:
        part.unlink()
        raise DamagedDataError(
            f"{url} is not the official file ({size:,} bytes, SHA-256 {found} instead of "
            f"{sha256}) and was deleted: name another mirror, or put the archive into "
            f"{destination.parent} by other means"
        )
    part.replace(destination)


def _receive_all(url: str, part: Path) -> bool:
    """Receives until all is there; returns whether it began with what was there."""
    patched = False
    failures = 0
    while True:
        before = _size(part)
        patched = patched or before > 0
        try:
            _receive(url, part)
        except _InterruptedError as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures == _TRIES or not error.again:
                raise MissingDataError(
                    f"cannot download {url}: {error}; {_size(part):,} bytes are in {part}: try "
                    "again, which goes on where this stopped, or name a mirror, or put the archive "
                    "there by other means"
                ) from error
            time.sleep(_FIRST_WAIT_SECONDS * 2 ** (failures - 1))
        else:
            return patched


def _receive(url: str, part: Path) -> None:
    """Receives what is missing of a file, in one connection."""
    start = _size(part)
    request = _call(Request, url, headers={"User-Agent": "revdata"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = _call(urlopen, request, timeout=_TIMEOUT_SECONDS)
    except HTTPError as error:
        if error.code == 416:  # nothing comes after these bytes: the checksum tells what they are
            return
        again = error.code in (408, 429) or error.code >= 500
        raise _InterruptedError(error, again=again) from error
    with response:
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink(missing_ok=True)
                raise _InterruptedError("the host sent another piece than asked for", again=True)
        else:
            start = 0  # the host sends all of it, whatever was asked for
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with part.open("ab" if start else "wb") as file, _progress(part, start, total) as bar:
            while chunk := _call(response.read, _CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _size(part) < total:
        raise _InterruptedError(
            f"the connection ended after {_size(part):,} of {total:,} bytes", again=True
        )


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls what speaks to the network, so that its errors cannot be taken for the disk's."""
    try:
        return function(*args, **kwargs)
    except HTTPError:
        raise
    except URLError as error:
        # A file that is not there will not come; a host may.
        again = not isinstance(error.reason, FileNotFoundError)
        raise _InterruptedError(error.reason, again=again) from error
    except (OSError, HTTPException) as error:
        raise _InterruptedError(str(error) or repr(error), again=True) from error
    except ValueError as error:  # no URL
        raise _InterruptedError(error, again=False) from error


def _progress(part: Path, start: int, total: int | None) -> Any:
    """Shows bytes, speed and the time that is left: a bar, or now and then a line of a log."""
    return tqdm(
        desc=part.stem,
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
