"""Sums on the device are the averages that a loop would find."""

import torch
import torch.nn.functional as F

from revtrain.meter import Meter


def test_averages_weigh_every_image_alike():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    labels = torch.randint(0, 7, (50,), generator=generator)
    meter = Meter(torch.device("cpu"))
    for part in (slice(0, 32), slice(32, 50)):  # batches of different sizes
        loss = F.cross_entropy(logits[part], labels[part])
        meter.update(loss, logits[part], labels[part])
    averages = meter.read()
    assert averages.images == 50
    torch.testing.assert_close(averages.loss, F.cross_entropy(logits, labels).item())
    hits = (logits.argmax(1) == labels).float().mean().item()
    torch.testing.assert_close(averages.accuracy, hits)


def test_no_images_are_no_error():
    assert Meter(torch.device("cpu")).read().images == 0
