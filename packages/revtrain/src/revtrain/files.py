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
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): train again with --fresh") from error
