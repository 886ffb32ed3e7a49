"""The nets of Gomez et al. (2017) by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from revmodels.branches import BlockKind
from revmodels.network import Network
from revmodels.resnet import ResNet
from revmodels.revnet import RevNet


@dataclass(frozen=True)
class _Architecture:
    network: type[ResNet | RevNet]
    block: BlockKind
    blocks: tuple[int, ...]
    channels: tuple[int, ...]


# Table 3 of https://arxiv.org/abs/1707.04585
_ARCHITECTURES = {
    "resnet32": _Architecture(ResNet, "basic", (5, 5, 5), (16, 16, 32, 64)),
    "resnet110": _Architecture(ResNet, "basic", (18, 18, 18), (16, 16, 32, 64)),
    "resnet164": _Architecture(ResNet, "bottleneck", (18, 18, 18), (16, 16, 32, 64)),
    "revnet38": _Architecture(RevNet, "basic", (3, 3, 3), (32, 32, 64, 112)),
    "revnet110": _Architecture(RevNet, "basic", (9, 9, 9), (32, 32, 64, 128)),
    "revnet164": _Architecture(RevNet, "bottleneck", (9, 9, 9), (32, 32, 64, 128)),
}


def list_models() -> list[str]:
    """Lists the names that `create_model` knows.

    Example:
        >>> list_models()
        ['resnet110', 'resnet164', 'resnet32', 'revnet110', 'revnet164', 'revnet38']
    """
    return sorted(_ARCHITECTURES)


def create_model(
    name: str, num_classes: int = 10, in_channels: int = 3, *, reversing: bool = True
) -> Network:
    """Creates a net by name, with fresh weights.

    Args:
        name: One of `list_models()`.
        num_classes: Size of the output.
        in_channels: Channels of the images.
        reversing: Whether a RevNet reverses or stores its activations. A ResNet always stores.

    Returns:
        A net that maps images `(N, in_channels, H, W)` to logits `(N, num_classes)`.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> net = create_model("revnet38", num_classes=10)
        >>> sum(parameter.numel() for parameter in net.parameters())
        573994
    """
    if name not in _ARCHITECTURES:
        near = difflib.get_close_matches(name, _ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} Models: {', '.join(list_models())}")
    model = _ARCHITECTURES[name]
    arguments = (model.block, model.blocks, model.channels, num_classes, in_channels)
    if model.network is RevNet:
        return RevNet(*arguments, reversing=reversing)
    return ResNet(*arguments)
