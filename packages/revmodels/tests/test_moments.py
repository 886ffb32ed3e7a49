"""What is known of a batch is for that batch alone, and for who comes next."""

import gc
import threading

import pytest
import torch

from revmodels.moments import Moments, take, tell


def told(x):
    moments = Moments()
    moments.sums = torch.zeros(2, 1, 3)
    tell(x, moments)
    return moments


def test_who_comes_next_is_told_once():
    x = torch.randn(2, 3)
    moments = told(x)
    assert take(x) is moments
    assert take(x) is None


def test_a_detached_batch_is_the_same():
    x = torch.randn(2, 3, requires_grad=True) + 1
    moments = told(x)
    assert take(x.detach()) is moments
    moments = told(x.detach())
    assert take(x) is moments


@pytest.mark.parametrize(
    "other",
    [
        torch.clone,
        lambda x: x.add_(1),
        lambda x: x.detach().zero_(),
        lambda x: x[1:],
        lambda x: x.view(3, 2),
        lambda x: x.as_strided((2, 3), (1, 2)),
        lambda x: x.view(torch.int32),
    ],
)
def test_another_batch_is_not_told(other):
    x = torch.randn(2, 3)
    told(x)
    assert take(other(x)) is None
    assert take(x) is None  # nor this one, after another


def test_a_batch_of_another_thread_is_not_known():
    x, found = torch.randn(2, 3), []
    moments = told(x)
    thread = threading.Thread(target=lambda: found.append(take(x)))
    thread.start()
    thread.join()
    assert found == [None]
    assert take(x) is moments


def test_what_is_known_goes_with_the_batch():
    x = torch.randn(2, 3)
    y = x.detach()
    moments = told(x)
    del x
    assert moments.sums is not None
    del y
    gc.collect()
    assert moments.sums is None


def test_a_batch_of_inference_mode_is_not_told():
    with torch.inference_mode():
        x = torch.randn(2, 3)
        told(x)
        assert take(x) is None
    told(torch.randn(2, 3))
    assert take(x) is None
