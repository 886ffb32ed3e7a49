"""Reads CIFAR's pickles, and nothing that is not in them.

A pickle is a program, which may call whatever it can import. CIFAR's need four names, to build one
array of bytes; each is replaced here by a stand-in that does that and no more, so nothing is ever
imported or called on a file's behalf, and no version of numpy matters.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from revdata.errors import DamagedDataError


class _Constant:
    """Stands for `numpy.ndarray`, which is an argument only."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a state where none belongs")


class _Bytes(_Constant):
    """Stands for numpy's uint8 dtype, whose state says nothing more."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _MakeBytes(_Constant):
    """Stands for `numpy.dtype`, called with the type's name."""

    __slots__ = ()

    def __call__(self, name: object, *flags: object) -> _Bytes:
        if name != "u1":
            raise pickle.UnpicklingError(f"an array of {name!r} instead of bytes")
        return _Bytes()


class _Array:
    """Stands for an array that is empty until its state is set."""

    __slots__ = ("value",)

    value: NDArray[np.uint8]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, content = state
        # Python 2 has no bytes: its strings are read as Latin-1, one character a byte.
        data = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(dtype, _Bytes) or fortran_order or len(data) != math.prod(shape):
            raise pickle.UnpicklingError(f"an array that is not {shape} bytes in C order")
        self.value = np.frombuffer(data, dtype=np.uint8).reshape(shape)


class _MakeArray(_Constant):
    """Stands for numpy's `_reconstruct`, called with a class, a shape and a type, all unused."""

    __slots__ = ()

    def __call__(self, *_: object) -> _Array:
        return _Array()


class _Encode(_Constant):
    """Stands for `_codecs.encode`, by which protocol 2 writes bytes."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
        return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], _Constant] = {
    ("numpy", "ndarray"): _Constant(),
    ("numpy", "dtype"): _MakeBytes(),
    ("numpy.core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy._core.multiarray", "_reconstruct"): _MakeArray(),
    ("_codecs", "encode"): _Encode(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name}, which no CIFAR file holds")
        return _ADMITTED[module, name]


def unpickle(content: bytes, source: str) -> dict[str, Any]:
    """Reads a CIFAR file: a dictionary of lists, strings and uint8 arrays.

    Args:
        content: The pickle, written by Python 2 or by Python 3 in protocol 2 to 4.
        source: Where it comes from, for errors.

    Returns:
        The dictionary, with text keys, and arrays in place of the stand-ins.

    Raises:
        DamagedDataError: The pickle ends early, refers to anything but what builds an array of
            bytes, or is no dictionary.

    Example:
        >>> unpickle(pickle.dumps({"labels": [3, 1]}, protocol=2), "example")
        {'labels': [3, 1]}
    """
    try:
        record = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedDataError(
            f"{source} was cut short or is no CIFAR file, and was not read ({error!r}): replace it "
            "by the official file"
        ) from error
    if not isinstance(record, dict):
        raise DamagedDataError(f"{source} is no CIFAR file: it holds no dictionary")
    return {
        str(key): value.value if isinstance(value, _Array) else value
        for key, value in record.items()
    }
