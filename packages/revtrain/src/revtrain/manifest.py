"""What a whole checkpoint holds: every file with its size and its SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from revtrain.files import sync, write_json

_NAME = "manifest.json"

Damage = Literal["no manifest", "unreadable manifest", "missing file", "size", "checksum"]


class DamagedError(Exception):
    """A folder does not hold what its manifest says.

    Attributes:
        kind: What is wrong, in a word or two.
    """

    def __init__(self, folder: Path, kind: Damage, detail: str) -> None:
        super().__init__(f"{folder} is damaged ({kind}): {detail}")
        self.kind = kind


def write_manifest(folder: Path) -> None:
    """Lists all files of a folder, and waits until they and the list are on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": _digest(path),
            }
    write_json(folder / _NAME, {"files": files})


def check_manifest(folder: Path) -> None:
    """Reads every file of a folder and compares it with the manifest.

    Raises:
        DamagedError: Something is missing or other than it was.
    """
    path = folder / _NAME
    if not path.exists():
        raise DamagedError(folder, "no manifest", f"{_NAME} is missing")
    try:
        files = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in json.loads(path.read_text(encoding="utf-8"))["files"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise DamagedError(folder, "unreadable manifest", str(error)) from error
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(folder, "missing file", f"{name} is missing")
        if file.stat().st_size != size:
            found = f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
            raise DamagedError(folder, "size", found)
        try:
            found = _digest(file)
        except OSError as error:
            raise DamagedError(folder, "checksum", f"{name} cannot be read: {error}") from error
        if found != digest:
            raise DamagedError(folder, "checksum", f"{name} has another SHA-256 than when saved")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
