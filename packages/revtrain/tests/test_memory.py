"""The memory comparison finds what theory says: flat against growing."""

import json

import pytest
import torch

import revtrain
from revtrain.launch import make_accelerator


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 10


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_reconstructed_activations_are_flat_and_stored_ones_grow(batch, precision, monkeypatch):
    # The times of one round say as much: they are not compared.
    monkeypatch.setattr("revtrain.memory._SECONDS_PER_DEPTH", 0)
    spec = revtrain.NetSpec.of("revnet38", 10, 1, channels=(8, 8, 16, 32))
    accelerator = make_accelerator(cpu=True, mixed_precision=precision)
    small, large = revtrain.compare_memory(spec, *batch, accelerator, depths=(4, 16))
    assert (small.blocks, small.layers, large.layers) == (4, 50, 194)
    # Four times the blocks: the weights' copies in half precision are all that may grow.
    assert large.reversing.activation_bytes <= small.reversing.activation_bytes * 1.01
    assert large.reversing.peak_bytes <= small.reversing.peak_bytes * 1.01
    assert large.stored.activation_bytes > 3 * small.stored.activation_bytes
    assert large.stored.peak_bytes > 3 * small.stored.peak_bytes
    for cost in (small, large):
        assert cost.stored.activation_bytes <= cost.stored.peak_bytes
        assert cost.reversing.activation_bytes < cost.stored.activation_bytes
        assert 0 < cost.stored.step_seconds < 60
        assert 0 < cost.reversing.step_seconds < 60


def test_a_run_that_recomputes_measures_that(train, monkeypatch):
    monkeypatch.setattr("revtrain.finish.DEPTHS", (2,))
    monkeypatch.setattr("revtrain.memory._SECONDS_PER_DEPTH", 0)
    costs = {}
    for again in (False, True):
        run = train(out=str(again), recompute=again, memory=True, epochs=1)
        (costs[again],) = run.memory
        assert json.loads((run.run_folder / "memory.json").read_text())["recompute"] is again
    bytes_ = {again: cost.reversing.activation_bytes for again, cost in costs.items()}
    assert bytes_[True] < bytes_[False] / 2
    assert costs[True].stored.activation_bytes == costs[False].stored.activation_bytes


def test_ordinary_networks_are_refused(batch):
    accelerator = make_accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(ValueError, match="resnet32"):
        revtrain.compare_memory(revtrain.NetSpec.of("resnet32", 10, 1), *batch, accelerator)


def test_there_is_nothing_to_compare_for_an_ordinary_network(train):
    result = train(memory=True, model="resnet32", epochs=1)
    assert result.memory == []
    assert not (result.run_folder / "memory.json").exists()
