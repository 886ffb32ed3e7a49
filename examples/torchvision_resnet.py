"""Make somebody else's residual net reversible: torchvision's ResNet.

    python examples/torchvision_resnet.py

A residual block `relu(x + f(x))` cannot be undone. Two that follow each other can, as the branches
of one coupling over two streams, without the ReLU after the sum. That is another network than
before, of the same modules and as many parameters: train it from scratch or fine-tune it. Blocks
that change the shape stay as they are. In float64, so that the losses can be compared.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from revcore import ReversibleBlock, ReversibleSequential, set_reversing, track_memory


class Branch(nn.Module):
    """What a torchvision block adds to its input."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        x = block.relu(block.bn1(block.conv1(x)))
        y: Tensor = block.bn2(block.conv2(x))
        return y


class ReversibleStage(nn.Module):
    """A stage: its first block, and then couplings of all others by twos."""

    def __init__(self, stage: nn.Sequential) -> None:
        super().__init__()
        first, *others = stage
        self.first = first
        pairs = zip(others[::2], others[1::2], strict=True)
        self.chain = ReversibleSequential(
            *(ReversibleBlock(Branch(f), Branch(g)) for f, g in pairs)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y1, y2 = self.chain(x, x)  # two streams of all channels
        return F.relu((y1 + y2) / 2)


def make_reversible(net: ResNet) -> ResNet:
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(net, name, ReversibleStage(getattr(net, name)))
    return net


def train(*, reversing: bool, steps: int = 8) -> tuple[list[float], float]:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float64)[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(digits.target)
    net = make_reversible(ResNet(BasicBlock, [9, 5, 3, 3], num_classes=10))
    net = net.double()
    net.maxpool = nn.Identity()  # the images are small
    set_reversing(net, reversing)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    losses, kept = [], 0
    for step in range(steps):
        batch = slice(16 * step, 16 * step + 16)
        x = F.interpolate(images[batch], size=16, mode="bilinear")
        if step == 0:
            with track_memory() as memory:
                output = net(x)
                kept = memory.live_bytes
            del output
        loss = F.cross_entropy(net(x), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, kept / 2**20


def main() -> None:
    ours, kept = train(reversing=True)
    plain, kept_stored = train(reversing=False)
    print(f"kept after forward: {kept:.1f} MiB reversed, {kept_stored:.1f} MiB stored")
    print("loss reversed: " + " ".join(f"{loss:.4f}" for loss in ours))
    print("loss stored:   " + " ".join(f"{loss:.4f}" for loss in plain))
    assert abs(ours[-1] - plain[-1]) < 1e-6
    assert kept < kept_stored / 1.5


if __name__ == "__main__":
    main()
