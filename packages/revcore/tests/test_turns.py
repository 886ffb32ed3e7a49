"""A turn is given back in whole."""

import threading

import pytest
import torch

from revcore.turns import TURN


@pytest.mark.skipif(
    not hasattr(torch._C, "_remove_obj_from_tls"), reason="torch 2.11 cannot remove it"
)
def test_a_thread_that_ends_holds_nothing():
    """An object in torch's storage of a thread that ends as Python does aborts the process."""
    known = []

    def work():
        with TURN, TURN:
            known.append(torch._C._is_key_in_tls("revcore: turns"))
        known.append(torch._C._is_key_in_tls("revcore: turns"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert known == [True, False]
    with TURN:  # free for the next one
        pass
