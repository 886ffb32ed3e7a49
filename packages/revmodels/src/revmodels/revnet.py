"""Reversible residual networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revcore import AdditiveCoupling, ReversibleSequential, recompute, set_reversing
from revmodels.branches import BlockKind, expansion, make_branch
from revmodels.network import Head, Network, ResidualBlock, changes_shape


class ReversibleStage(nn.Module):
    """Creates a stage of a RevNet: an ordinary block where the shape changes, then a chain.

    Args:
        block: `"basic"` or `"bottleneck"`.
        count: Number of blocks, the ordinary one included.
        in_channels: Channels of the input.
        channels: Channels inside a block.
        stride: Stride of the first block.
        activate: Whether the first block begins with BatchNorm and ReLU.
    """

    def __init__(
        self,
        block: BlockKind,
        count: int,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        activate: bool,
    ) -> None:
        super().__init__()
        width = channels * expansion(block)
        if width % 2 or channels % 2:
            raise ValueError(
                f"channels must be even, to be split in two streams, got {channels} in a stage"
            )
        self.transition: nn.Module = nn.Identity()
        starts_with_transition = changes_shape(in_channels, width, stride)
        if starts_with_transition:
            self.transition = ResidualBlock(block, in_channels, channels, stride, activate=activate)
        self.chain = ReversibleSequential()
        for position in range(int(starts_with_transition), count):
            f, g = (
                make_branch(block, width // 2, channels // 2, activate=activate or position > 0)
                for _ in range(2)
            )
            self.chain.append(AdditiveCoupling(f, g))

    def forward(self, x: Tensor, before: Sequence[nn.Module] | None = None) -> Tensor:
        """Maps `(N, C, H, W)` to `(N, C', H', W')`.

        Args:
            x: The input.
            before: Given if the first block is to be recomputed; modules that come before it and
                are recomputed together with it.
        """
        if before is None:
            x = self.transition(x)
        elif before or not isinstance(self.transition, nn.Identity):
            x = recompute(nn.Sequential(*before, self.transition), x)
        if torch.is_autocast_enabled(x.device.type):
            # Rounding errors of the reconstruction stay small while the streams are float32, even
            # where the branches compute in half precision.
            x = x.float()
        out: Tensor = self.chain(x)
        return out


class RevNet(Network):
    """Creates a RevNet for small images: its blocks reconstruct activations, not store them.

    References:
        The Reversible Residual Network: Backpropagation Without Storing Activations
        (Gomez et al., 2017), section 5. https://arxiv.org/abs/1707.04585

    Args:
        block: `"basic"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1; four times wider).
        blocks: Blocks in each stage. A block at which the shape changes is an ordinary one.
        channels: Channels of the stem and of each stage, even numbers.
        num_classes: Size of the output.
        in_channels: Channels of the images.
        reversing: Whether to reverse, or to store activations as plain autograd does; the same as
            `revcore.set_reversing(net, reversing)`.
        recompute: Whether to run what cannot be reversed (the stem, the blocks at which the shape
            changes, the head) again in the backward pass, and keep only what goes into it. An
            attribute of this name can be changed later.

    Raises:
        TypeError: If `blocks` or `channels` is no sequence.
        ValueError: If an argument is out of its range, or a number of channels cannot be split.

    Example:
        >>> import torch
        >>> net = RevNet("basic", blocks=(2, 2, 2), channels=(8, 8, 16, 32))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        block: BlockKind,
        blocks: Sequence[int],
        channels: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        reversing: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__(block, blocks, channels, num_classes, in_channels)
        set_reversing(self, reversing)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return super().forward(x)
        before = [self.stem]
        for stage in self.stages:
            x, before = stage(x, before), []
        return recompute(Head(self.norm, self.classifier), x)

    def make_stage(
        self,
        block: BlockKind,
        count: int,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        activate: bool,
    ) -> nn.Module:
        return ReversibleStage(block, count, in_channels, channels, stride, activate=activate)
