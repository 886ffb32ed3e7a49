"""Residual networks, the baseline of the reversible ones."""

from __future__ import annotations

from torch import nn

from revmodels.branches import BlockKind, expansion
from revmodels.network import Network, ResidualBlock


class ResNet(Network):
    """Creates a pre-activation ResNet for small images.

    References:
        Identity Mappings in Deep Residual Networks (He et al., 2016).
        https://arxiv.org/abs/1603.05027

        The Reversible Residual Network: Backpropagation Without Storing Activations
        (Gomez et al., 2017), section 5. https://arxiv.org/abs/1707.04585

    Args:
        block: `"basic"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1; four times wider).
        blocks: Blocks in each stage.
        channels: Channels of the stem and of each stage; one number more than `blocks` has.
        num_classes: Size of the output.
        in_channels: Channels of the images.

    Raises:
        TypeError: If `blocks` or `channels` is no sequence.
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> net = ResNet("basic", blocks=(1, 1, 1), channels=(8, 8, 16, 32))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

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
        width = channels * expansion(block)
        return nn.Sequential(
            ResidualBlock(block, in_channels, channels, stride, activate=activate),
            *(ResidualBlock(block, width, channels) for _ in range(count - 1)),
        )
