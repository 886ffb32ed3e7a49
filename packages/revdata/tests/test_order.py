import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revdata.order import epoch_order, hash_integers, random_below, rank_bounds

SEEDS = st.integers(-(2**70), 2**70)
EPOCHS = st.integers(0, 10_000)


def splitmix64(*keys):
    """The same hash in Python's integers."""
    mask, h = 2**64 - 1, 0
    for key in keys:
        h = ((h ^ (key & mask)) + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return h


@given(SEEDS, EPOCHS, st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_hash_is_splitmix64_on_64_bit_integers(seed, epoch, index):
    hashed = hash_integers(seed, epoch, index=torch.tensor(index))
    assert [h % 2**64 for h in hashed.tolist()] == [splitmix64(seed, epoch, i) for i in index]


def test_hash_is_that_of_the_published_generator():
    # SplitMix64's first output from state 0, as in its authors' reference implementation.
    assert hash_integers(index=torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF


@given(st.integers(0, 300), SEEDS, EPOCHS)
def test_order_is_a_permutation_that_seed_and_epoch_determine(size, seed, epoch):
    order = epoch_order(size, seed=seed, epoch=epoch, shuffle=True)
    assert order.sort().values.tolist() == list(range(size))
    assert torch.equal(order, epoch_order(size, seed=seed, epoch=epoch, shuffle=True))


@given(SEEDS, EPOCHS)
def test_orders_of_other_epochs_and_seeds_are_unrelated(seed, epoch):
    order = epoch_order(1000, seed=seed, epoch=epoch, shuffle=True)
    for other_seed, other_epoch in ((seed, epoch + 1), (seed + 1, epoch)):
        other = epoch_order(1000, seed=other_seed, epoch=other_epoch, shuffle=True)
        # Two random orders agree in one place on average; in 20 never.
        assert (order == other).sum() < 20


def test_order_is_for_ever_the_same():
    order = epoch_order(10, seed=17, epoch=3, shuffle=True)
    assert order.tolist() == [0, 4, 5, 2, 8, 1, 9, 3, 6, 7]


def test_every_device_gives_the_same_order(device):
    here = epoch_order(50_000, seed=1, epoch=2, shuffle=True, device=device)
    assert here.device.type == device.type
    assert torch.equal(here.cpu(), epoch_order(50_000, seed=1, epoch=2, shuffle=True))


def test_without_shuffling_the_order_is_that_of_the_files():
    assert epoch_order(4, seed=1, epoch=2, shuffle=False).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bound", [2, 9])
def test_random_integers_are_uniform_and_independent_of_their_neighbors(bound):
    draws = random_below(bound, 5, 1, index=torch.arange(90_000))
    pairs = torch.bincount(draws[:-1] * bound + draws[1:], minlength=bound**2).double()
    expected = pairs.sum() / bound**2
    chi_squared = ((pairs - expected) ** 2 / expected).sum().item()
    # 81 cells: the 99.99th percentile with 80 degrees of freedom is 133; 4 cells: 21 with 3.
    assert chi_squared < {2: 21, 9: 133}[bound]


@given(st.integers(0, 500), st.integers(0, 100), st.integers(1, 9))
def test_ranks_share_a_batch_without_gap_or_overlap(start, size, world_size):
    parts = [rank_bounds(start, start + size, rank, world_size) for rank in range(world_size)]
    assert parts[0][0] == start
    assert parts[-1][1] == start + size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    sizes = [b - a for a, b in parts]
    assert max(sizes) - min(sizes) <= 1
