"""A reversible net in a plain PyTorch loop: autocast, clipping, a schedule, a checkpoint.

    python examples/plain_loop.py

Nothing in the loop knows that the net is reversible.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from revcore import track_memory
from revmodels import RevNet


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return images[train], labels[train], images[test], labels[test]


def train(*, reversing: bool, epochs: int = 8) -> tuple[nn.Module, float, float]:
    torch.manual_seed(0)
    images, labels, *_ = load()
    net = RevNet("basic", (4, 4), (8, 8, 16), in_channels=1, reversing=reversing)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    steps = epochs * len(images) // 100
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    loss = torch.zeros(())
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    with track_memory() as memory:
        output = net(images[:100])
        kept = memory.live_bytes
    assert output.requires_grad
    return net, loss.item(), kept / 2**20


def accuracy(net: nn.Module) -> float:
    *_, images, labels = load()
    with torch.no_grad():
        return (net.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    net, loss, kept = train(reversing=True)
    stored, loss_stored, kept_stored = train(reversing=False)
    print(f"kept after forward: {kept:.1f} MiB reversed, {kept_stored:.1f} MiB stored")
    print(f"last loss: {loss:.4f} reversed, {loss_stored:.4f} stored")
    print(f"accuracy: {accuracy(net):.1%} reversed, {accuracy(stored):.1%} stored")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        torch.save(net.state_dict(), file)
        # Either kind of net loads what the other saved.
        stored.load_state_dict(torch.load(file))
    assert accuracy(stored) == accuracy(net) > 0.9
    assert kept < kept_stored / 2


if __name__ == "__main__":
    main()
