"""The nets of Gomez et al. (2017) by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from revmodels.branches import BlockKind
from revmodels.resnet import ResNet
from revmodels.revnet import RevNet


@dataclass(frozen=True)
class Architecture:
    """What makes one net different from another; `dataclasses.replace` makes a deeper one.

    Attributes:
        network: `ResNet` or `RevNet`.
        block: `"basic"` or `"bottleneck"`.
        blocks: Blocks in each stage.
        channels: Channels of the stem and of each stage.

    Example:
        >>> from dataclasses import replace
        >>> deeper = replace(get_architecture("revnet38"), blocks=(5, 5, 5))
        >>> deeper.layers
        62
        >>> type(deeper.build(num_classes=10)).__name__
        'RevNet'
    """

    network: type[ResNet | RevNet]
    block: BlockKind
    blocks: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def reversible(self) -> bool:
        """Whether the net can reconstruct its activations."""
        return issubclass(self.network, RevNet)

    @property
    def layers(self) -> int:
        """The number in the net's name: layers with weights, a reversible block counted twice."""
        convolutions = 2 if self.block == "basic" else 3
        branches = 2 if self.reversible else 1
        return sum(self.blocks) * convolutions * branches + 2

    def build(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        reversing: bool = True,
        recompute: bool = False,
    ) -> ResNet | RevNet:
        """Creates the net with fresh weights.

        Args:
            num_classes: Size of the output.
            in_channels: Channels of the images.
            reversing: Whether a RevNet reverses or stores its activations. A ResNet always stores.
            recompute: Whether a RevNet recomputes what it cannot reverse.

        Raises:
            ValueError: If a size is out of range, or channels cannot be split in two streams.
        """
        arguments = (self.block, self.blocks, self.channels, num_classes, in_channels)
        if issubclass(self.network, RevNet):
            return self.network(*arguments, reversing=reversing, recompute=recompute)
        return self.network(*arguments)


# Table 3 of https://arxiv.org/abs/1707.04585
_ARCHITECTURES = {
    "resnet32": Architecture(ResNet, "basic", (5, 5, 5), (16, 16, 32, 64)),
    "resnet110": Architecture(ResNet, "basic", (18, 18, 18), (16, 16, 32, 64)),
    "resnet164": Architecture(ResNet, "bottleneck", (18, 18, 18), (16, 16, 32, 64)),
    "revnet38": Architecture(RevNet, "basic", (3, 3, 3), (32, 32, 64, 112)),
    "revnet110": Architecture(RevNet, "basic", (9, 9, 9), (32, 32, 64, 128)),
    "revnet164": Architecture(RevNet, "bottleneck", (9, 9, 9), (32, 32, 64, 128)),
}


def list_models() -> list[str]:
    """Lists the names that `create_model` knows.

    Example:
        >>> list_models()
        ['resnet110', 'resnet164', 'resnet32', 'revnet110', 'revnet164', 'revnet38']
    """
    return sorted(_ARCHITECTURES)


def create_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    reversing: bool = True,
    recompute: bool = False,
) -> ResNet | RevNet:
    """Creates a net by name, with fresh weights.

    Args:
        name: One of `list_models()`.
        num_classes: Size of the output.
        in_channels: Channels of the images.
        reversing: Whether a RevNet reverses or stores its activations. A ResNet always stores.
        recompute: Whether a RevNet recomputes what it cannot reverse, and keeps less.

    Returns:
        A net that maps images `(N, in_channels, H, W)` to logits `(N, num_classes)`.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> net = create_model("revnet38", num_classes=10)
        >>> sum(parameter.numel() for parameter in net.parameters())
        573994
    """
    return get_architecture(name).build(
        num_classes, in_channels, reversing=reversing, recompute=recompute
    )


def get_architecture(name: str) -> Architecture:
    """Returns what a net is made of, by name.

    Raises:
        ValueError: If the name is unknown; the message lists the right ones.

    Example:
        >>> get_architecture("revnet38").channels
        (32, 32, 64, 112)
    """
    if name not in _ARCHITECTURES:
        near = difflib.get_close_matches(name.lower(), _ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown model {name!r}; {hint}Models: {', '.join(list_models())}")
    return _ARCHITECTURES[name]
