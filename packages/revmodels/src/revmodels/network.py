"""What ResNets and RevNets share: stem, stages, head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from revcore import Destination, self_contained
from revmodels.batchnorm import batch_norm_relu
from revmodels.branches import BlockKind, ConvNorm, batch_norm, conv, expansion, make_branch


@self_contained
class ResidualBlock(nn.Module):
    """Creates an ordinary residual block, `shortcut(x) + branch(x)`.

    Args:
        kind: `"basic"` or `"bottleneck"`.
        in_channels: Channels of the input.
        channels: Channels inside the branch.
        stride: Stride of the block.
        activate: Whether the branch begins with BatchNorm and ReLU.
    """

    def __init__(
        self,
        kind: BlockKind,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.branch = make_branch(kind, in_channels, channels, stride, activate=activate)
        out_channels = channels * expansion(kind)
        self.shortcut: nn.Module = nn.Identity()
        if changes_shape(in_channels, out_channels, stride):
            self.shortcut = ConvNorm(conv(in_channels, out_channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, C, H, W)` to `(N, C', H', W')`."""
        shortcut: Tensor = self.shortcut(x)
        if torch.compiler.is_compiling():  # no kernel of ours will run, which could add
            y: Tensor = self.branch(x)
            return shortcut + y
        with Destination(self.branch, shortcut, 1) as destination:
            y = self.branch(x)
        return y if destination.added else shortcut + y


def changes_shape(in_channels: int, out_channels: int, stride: int) -> bool:
    """Tells whether a block needs a shortcut that is not the identity."""
    return stride != 1 or in_channels != out_channels


class Network(nn.Module, ABC):
    """Base of the nets of Gomez et al. (2017): stem, stages of blocks, average pooling, classifier.

    Args:
        block: `"basic"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1; four times wider).
        blocks: Blocks in each stage. The first stage keeps the size of the image, each later one
            halves it.
        channels: Channels of the stem and of each stage; one number more than `blocks` has.
        num_classes: Size of the output.
        in_channels: Channels of the images.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        block: BlockKind,
        blocks: Sequence[int],
        channels: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check(block, blocks, channels, num_classes, in_channels)
        stem, *widths = channels
        self.stem = ConvNorm(conv(in_channels, stem, 3), activate=True)
        self.stages = nn.Sequential()
        width = stem
        for position, (count, inner) in enumerate(zip(blocks, widths, strict=True)):
            stride = 2 if position else 1
            self.stages.append(
                self.make_stage(block, count, width, inner, stride, activate=position > 0)
            )
            width = inner * expansion(block)
        self.norm = batch_norm(width)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @abstractmethod
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
        """Creates a stage of `count` blocks; `activate` is for the first of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes logits.

        Args:
            x: Images, floating point, shape `(N, in_channels, H, W)`.

        Returns:
            Logits, shape `(N, num_classes)`.
        """
        return classify(self.norm, self.classifier, self.stages(self.stem(x)))


def classify(norm: nn.Module, classifier: nn.Module, x: Tensor) -> Tensor:
    """Maps the last activations `(N, C, H, W)` to logits."""
    # In full precision, because a mean over the image comes next.
    x = batch_norm_relu(norm, x, cast=False)
    logits: Tensor = classifier(x.mean((2, 3)))
    return logits


@self_contained
class Head(nn.Module):
    """Creates `classify` as a module, of modules that are there already."""

    def __init__(self, norm: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, C, H, W)` to logits."""
        return classify(self.norm, self.classifier, x)


def _check(
    block: str, blocks: Sequence[int], channels: Sequence[int], num_classes: int, in_channels: int
) -> None:
    if block not in ("basic", "bottleneck"):
        raise ValueError(f"block={block!r} is unknown; use 'basic' or 'bottleneck'")
    for name, values in (("blocks", blocks), ("channels", channels)):
        if not isinstance(values, Sequence):
            raise TypeError(f"{name}={values!r} must be a sequence of integers, one for each stage")
    if len(channels) != len(blocks) + 1:
        raise ValueError(
            f"channels={tuple(channels)} must have one number for the stem and one for each of the "
            f"{len(blocks)} stages in blocks={tuple(blocks)}"
        )
    for name, values in (
        ("blocks", blocks),
        ("channels", channels),
        ("num_classes", (num_classes,)),
        ("in_channels", (in_channels,)),
    ):
        if not all(map(_is_count, values)):
            raise ValueError(f"{name} must be positive integers, got {tuple(values)}")


def _is_count(value: object) -> bool:
    return isinstance(value, SupportsIndex) and index(value) > 0
