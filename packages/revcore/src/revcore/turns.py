"""Branches run one at a time, whatever the thread.

Random generators, buffers and training flags belong to the process or to the module, not to a call.
"""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()

# How often a thread has taken its turn. torch hands such objects on to autograd's threads.
_KEY = "revcore: turns"
_is_known = torch._C._is_key_in_tls
_get = torch._C._get_obj_in_tls
_set = torch._C._stash_obj_in_tls
# Older releases of torch have no such thing. A thread that ends with an object there, just as
# Python ends, may abort the process.
_remove = getattr(torch._C, "_remove_obj_from_tls", lambda key: _set(key, 0))


class _Turn:
    """Waits for this thread's turn, unless it has come already.

    It is also the turn of the threads in which autograd works for this one: a branch that
    differentiates something on a GPU in its forward pass waits for them.
    """

    def __enter__(self) -> None:
        depth = _get(_KEY) if _is_known(_KEY) else 0
        if not depth:
            _lock.acquire()
        _set(_KEY, depth + 1)

    def __exit__(self, *_: object) -> None:
        depth = _get(_KEY) - 1
        if depth:
            _set(_KEY, depth)
        else:
            _remove(_KEY)
            _lock.release()


TURN = _Turn()
