"""A batch in parts gives the gradients of the whole, where no layer looks at the batch."""

import pytest
import torch
from tiny import TINY
from torch import nn

from revcore import ReversibleBlock, ReversibleSequential
from revtrain.accumulate import forward_backward
from revtrain.config import TrainConfig
from revtrain.launch import make_accelerator
from revtrain.trainer import Trainer


def net():
    """A reversible network without batch statistics, in float64."""
    torch.manual_seed(0)

    def branch():
        return nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1)
        )

    blocks = (ReversibleBlock(branch(), branch()) for _ in range(3))
    return nn.Sequential(ReversibleSequential(*blocks), nn.Flatten(), nn.Linear(8 * 16, 5)).double()


def gradients(model, x, labels, parts):
    accelerator = make_accelerator(cpu=True, mixed_precision=None, accumulate=parts)
    model = accelerator.prepare(model)
    for _ in range(2):  # the second batch starts a count of its own
        model.zero_grad()
        loss, logits = forward_backward(model, x, labels, nn.functional.cross_entropy, accelerator)
    assert accelerator.sync_gradients
    return [loss, logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_give_the_gradients_of_the_whole(parts):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 8, 4, 4, dtype=torch.float64, generator=generator)
    labels = torch.arange(12) % 5
    whole, in_parts = gradients(net(), x, labels, 1), gradients(net(), x, labels, parts)
    torch.testing.assert_close(in_parts, whole, rtol=1e-10, atol=1e-12)


def test_a_run_in_parts_takes_the_same_steps(train, plain):
    """Batch normalization sees the parts, so the curve is another one; the samples are the same."""
    in_parts = train(accumulate=4)
    for name in ("step", "lr"):
        assert [r[name] for r in plain.metrics] == [r[name] for r in in_parts.metrics]
    losses = [[r["train_loss"] for r in result.metrics] for result in (plain, in_parts)]
    torch.testing.assert_close(*losses, rtol=0.1, atol=0)
    assert losses[0] != losses[1]


def test_evaluation_holds_no_more_images_than_a_step(tmp_path):
    trainer = Trainer(TrainConfig(**{**TINY, "out": tmp_path, "accumulate": 4}))
    assert max(len(labels) for _, labels in trainer.test_loader) == TINY["batch_size"] // 4


def test_the_environment_is_heard_and_the_option_wins(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    heard, overridden = train(out="heard", epochs=1), train(out="won", epochs=1, accumulate=1)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    two, one = train(out="two", epochs=1, accumulate=2), train(out="one", epochs=1)
    losses = [result.metrics[0]["train_loss"] for result in (heard, overridden, two, one)]
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]
