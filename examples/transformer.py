"""Make my transformer encoder reversible.

    python examples/transformer.py

Self-attention and the feed-forward net, which an encoder adds to its stream in turn, become the two
branches of a block. The images of scikit-learn's digits are read as sequences of 16 patches.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from revcore import ReversibleBlock, ReversibleSequential, set_reversing, track_memory

WIDTH, HEADS, LAYERS, STEPS, BATCH = 32, 4, 4, 100, 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


def feed_forward() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
    )


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 2 * WIDTH)  # two streams
        self.position = nn.Parameter(0.02 * torch.randn(16, 2 * WIDTH))
        # What was a loop over `x = x + attention(x); x = x + feed_forward(x)`.
        self.layers = ReversibleSequential(
            *(ReversibleBlock(Attention(), feed_forward()) for _ in range(LAYERS)), split_dim=-1
        )
        self.head = nn.Linear(2 * WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        x = self.layers(self.embed(patches) + self.position)
        y: Tensor = self.head(x.mean(1))
        return y


def train(*, reversing: bool) -> tuple[list[float], float, float]:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    training, held_out = order[:1500], order[1500:]
    net = set_reversing(Encoder(), reversing)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    with track_memory() as memory:
        output = net(images[:BATCH])
        kept = memory.live_bytes
    del output
    losses = []
    for _ in range(STEPS):
        batch = training[torch.randint(len(training), (BATCH,))]
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        right = net.eval()(images[held_out]).argmax(1) == labels[held_out]
    return losses, kept / 2**20, right.float().mean().item()


def main() -> None:
    ours, kept, accuracy = train(reversing=True)
    plain, kept_stored, _ = train(reversing=False)
    print(f"kept after forward: {kept:.1f} MiB reversed, {kept_stored:.1f} MiB stored")
    print(f"loss: {ours[0]:.4f} to {ours[-1]:.4f} reversed, to {plain[-1]:.4f} stored")
    print(f"accuracy on held-out images: {accuracy:.1%}")
    assert abs(ours[-1] - plain[-1]) < 0.05
    assert kept < kept_stored / 3


if __name__ == "__main__":
    main()
