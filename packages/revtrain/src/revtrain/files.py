"""Files that are whole or absent: a run that is killed leaves no half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and renames it when all is written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with whole_file(path) as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> path.read_text()
        '1 2 3'
    """
    # The suffix stays, because matplotlib reads the format from it.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    if path.is_dir():
        if os.name == "nt":  # does not open folders, and keeps their order by itself
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; refuses numbers that JSON lacks (NaN, infinity)."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=2, default=_plain, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    with whole_file(path) as temporary:
        lines = (json.dumps(record, default=_plain, allow_nan=False) for record in records)
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} has no place in a JSON file")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is no JSON; the message names the file.
    """
    return _parse(_read(path), path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: A line is no JSON; the message names the file.
    """
    return [_parse(line, path) for line in _read(path).splitlines()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): train again with --fresh") from error


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): train again with --fresh") from error
