"""A network as the few values that it can be built from again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from revmodels import Architecture, get_architecture


def memory_format(device: torch.device) -> torch.memory_format:
    """Returns the layout that convolutions are fastest in: channels last on CUDA."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network to a device, in the layout of `memory_format`."""
    moved: nn.Module = model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]
    return moved


def unwrap(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Returns the network inside of what `accelerator.prepare` made of it."""
    # Told to keep what torch.compile wrapped, Accelerate would take DistributedDataParallel out of
    # it for good, and name all weights after the wrapper.
    net: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    return net


@dataclass(frozen=True)
class NetSpec:
    """What a network is built from; stored beside its weights.

    Attributes:
        model: A name that `revmodels.create_model` knows.
        num_classes: Size of the output.
        in_channels: Channels of the images.
        blocks: Blocks in each stage.
        channels: Channels of the stem and of each stage.

    Example:
        >>> spec = NetSpec.of("revnet38", num_classes=10, in_channels=1, blocks=(1, 1, 1))
        >>> spec.channels
        (32, 32, 64, 112)
        >>> NetSpec.from_json(spec.to_json()) == spec
        True
    """

    model: str
    num_classes: int
    in_channels: int
    blocks: tuple[int, ...]
    channels: tuple[int, ...]

    @classmethod
    def of(
        cls,
        model: str,
        num_classes: int,
        in_channels: int,
        blocks: tuple[int, ...] | None = None,
        channels: tuple[int, ...] | None = None,
    ) -> NetSpec:
        """Completes a name with the network's own blocks and channels, where none are given.

        Raises:
            ValueError: There is no network of this name.
        """
        own = get_architecture(model)
        return cls(model, num_classes, in_channels, blocks or own.blocks, channels or own.channels)

    @property
    def architecture(self) -> Architecture:
        """The named architecture, with these blocks and channels."""
        own = get_architecture(self.model)
        return replace(own, blocks=self.blocks, channels=self.channels)

    def build(self, *, reversing: bool = True, recompute: bool = False) -> nn.Module:
        """Makes the network with fresh weights.

        Args:
            reversing: Whether chains reconstruct their activations.
            recompute: Whether what lies between the chains runs again in the backward pass.

        Raises:
            ValueError: A size is out of range, a number of channels cannot be split in two, or an
                ordinary network is to be recomputed.
        """
        if recompute and not self.architecture.reversible:
            raise ValueError(
                f"recompute is for reversible networks, and model (={self.model!r}) is none: leave "
                "it out"
            )
        return self.architecture.build(
            self.num_classes, self.in_channels, reversing=reversing, recompute=recompute
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NetSpec:
        """Reads what `to_json` returned, also after a way through a file."""
        return cls(
            values["model"],
            values["num_classes"],
            values["in_channels"],
            tuple(values["blocks"]),
            tuple(values["channels"]),
        )
