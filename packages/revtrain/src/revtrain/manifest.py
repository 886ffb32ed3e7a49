"""What a whole checkpoint holds: every file with its size and its SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from revtrain.files import sync, write_json

_NAME = "manifest.json"

Damage = Literal[
    "no manifest", "unreadable manifest", "another run", "missing file", "size", "checksum"
]


class DamagedError(Exception):
    """A folder does not hold what its manifest says.

    Attributes:
        kind: What is wrong, in a word or two.
    """

    def __init__(self, folder: Path, kind: Damage, detail: str) -> None:
        super().__init__(f"{folder} is damaged ({kind}): {detail}")
        self.kind = kind


def write_manifest(folder: Path, run: str | None = None) -> None:
    """Lists all files of a folder, and waits until they and the list are on the disk.

    Args:
        folder: The folder.
        run: Of which run it is.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": _digest(path),
            }
    write_json(folder / _NAME, {"run": run, "files": files})


def check_manifest(folder: Path, run: str | None = None) -> None:
    """Reads every file of a folder and compares it with the manifest.

    Args:
        folder: The folder.
        run: Of which run it must be; None for any.

    Raises:
        DamagedError: Something is missing or other than it was.
    """
    path = folder / _NAME
    if not path.exists():
        raise DamagedError(folder, "no manifest", f"{_NAME} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise DamagedError(folder, "unreadable manifest", str(error)) from error
    if not files:
        raise DamagedError(folder, "unreadable manifest", "it lists no files")
    if run is not None and manifest.get("run") != run:
        raise DamagedError(folder, "another run", f"it is of {manifest.get('run')}, not {run}")
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
