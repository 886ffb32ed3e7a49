"""Launching kernels, and compiling them side by side before they are launched.

Triton compiles a kernel when it is launched first, half a second for each and one after the other:
twenty to forty seconds in the first step of a net. What they are can be known before. In a step on
fake tensors, which have shapes and dtypes but no data, a launch only says what is to be compiled,
and threads do that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]

# A net of thousands of layers takes longer on fake tensors than its kernels take to compile.
_SECONDS = 10.0


class _Compiler:
    """Compiles kernels in threads, each for its kinds of arguments once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._known: set[Any] = set()
        self._end = time.monotonic() + _SECONDS

    def add(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if time.monotonic() > self._end:
            raise TimeoutError(f"a step on fake tensors takes more than {_SECONDS:g} s")
        key = kind_of(kernel, arguments, options)
        if key not in self._known:
            self._known.add(key)
            types = [x.dtype if isinstance(x, Tensor) else x for x in arguments]
            self._pool.submit(_compile, kernel, types, options, arguments[0].device)

    def close(self) -> None:
        """Waits for all of them. What went wrong will do so again at a launch, which says so."""
        self._pool.shutdown()


def _compile(kernel: Any, types: list[Any], options: dict[str, Any], device: torch.device) -> None:
    with torch.cuda.device(device):
        kernel.warmup(*types, grid=(1,), **options)


_compiler: _Compiler | None = None


def launch(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Launches a kernel of Triton; with fake tensors it is only compiled.

    Args:
        kernel: What `triton.jit` made.
        grid: How many programs.
        arguments: The first one is a tensor.
        options: Of the compiler.
    """
    if _compiler is None or not is_fake(arguments[0]):
        kernel[grid](*arguments, **options)
    else:
        _compiler.add(kernel, arguments, options)


def kind_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what of a launch the compiler makes a difference of, or more."""
    kinds: list[Any] = []
    for name, value in zip(kernel.arg_names, arguments, strict=True):
        if name.isupper():  # a constant of the compiler
            kinds.append(value)
        elif isinstance(value, Tensor):
            kinds.append(value.dtype)
        else:
            kinds.append((type(value), value == 1, value % 16 == 0))
    return (id(kernel), *kinds, *options.items())


def is_compiling_ahead() -> bool:
    """Tells whether this is amid `side_by_side`."""
    return _compiler is not None


def is_fake(x: Tensor) -> bool:
    """Tells whether a tensor is one of `side_by_side`."""
    if _compiler is None:
        return False
    from torch._subclasses import FakeTensor  # noqa: PLC0415 - a second that few need

    return isinstance(x, FakeTensor)


@contextmanager
def side_by_side() -> Iterator[Any]:
    """Makes a context in which `launch` compiles kernels for fake tensors, and gives their mode.

    Its end waits for the compiler. Only one thread at a time may be in one.
    """
    from torch._subclasses import FakeTensorMode  # noqa: PLC0415 - a second that few need

    global _compiler  # noqa: PLW0603 - a backward pass runs in threads of its own
    _compiler = compiler = _Compiler()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        _compiler = None
        compiler.close()
