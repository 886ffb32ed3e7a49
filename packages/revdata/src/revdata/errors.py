"""What can go wrong with data: every message is one line that names the way out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class DataError(Exception):
    """Base of all errors that a user of this package can cause and mend.

    A command line catches this one class, prints the line and exits.
    """


class ArgumentError(DataError, ValueError):
    """An argument that cannot be used: an unknown name, a batch size of zero."""


class MissingDataError(DataError, FileNotFoundError):
    """The files of a data set, or the package that ships them, are not there."""


class DamagedDataError(DataError):
    """A file that was cut short, has the wrong checksum, or holds what no data file may hold."""


def unknown_name(kind: str, name: str, known: Sequence[str]) -> ArgumentError:
    """Creates the error for a name that is not known, with the known ones and the nearest.

    Example:
        >>> print(unknown_name("data set", "cifar11", ["cifar10", "digits"]))
        unknown data set 'cifar11'; known: cifar10, digits; did you mean 'cifar10'?
    """
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    question = f"; did you mean {near[0]!r}?" if near else ""
    return ArgumentError(f"unknown {kind} {name!r}; known: {', '.join(known)}{question}")
