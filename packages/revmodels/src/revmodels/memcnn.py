"""Weights that MemCNN saved."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# In the order in which they are tried; what follows "layer1.0." is the business of _BLOCK.
_OUTSIDE = {"conv1": "stem.0", "bn1": "stem.1", "bn_final": "norm", "fc": "classifier"}
_BLOCK = re.compile(
    r"layer(?P<stage>\d+)\.(?P<block>\d+)\."
    r"(?:(?P<shortcut>downsample)|(?:basicblock|bottleneck)_sub|revblock\._fn\.(?P<side>[FG])m)"
    r"\.(?P<rest>.+)"
)
_LAYER = re.compile(r"(conv|bn)(\d+)\.(.+)")


def from_memcnn(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a net that MemCNN saved, for the net of the same name here.

    MemCNN's six nets of `memcnn.config` have the epsilon of BatchNorm that ours have. A net of
    `memcnn.models.resnet.ResNet` that was made with `batch_norm_fix=True`, its default, has 1e-3:
    set `eps` of each `BatchNorm2d` to that.

    References:
        MemCNN: A Python/PyTorch package for creating memory-efficient invertible neural networks
        (van de Leemput et al., 2019). https://doi.org/10.21105/joss.01576

    Args:
        state_dict: That of a `memcnn.models.resnet.ResNet` of any of its blocks, as its trainer
            saves it.

    Returns:
        A state dict with the same tensors, for `load_state_dict`.

    Raises:
        ValueError: If a name is not one of MemCNN's.

    Example:
        >>> import torch
        >>> list(from_memcnn({"layer2.1.revblock._fn.Fm.conv2.weight": torch.zeros(1)}))
        ['stages.1.chain.1.f.convs.1.weight']
    """
    reversible = any(".revblock." in name for name in state_dict)
    # A reversible stage whose first block changes the shape has that one before its chain.
    transitions = {name.split(".")[0] for name in state_dict if ".0.downsample." in name}
    return {
        _rename(name, reversible=reversible, transitions=transitions): value
        for name, value in state_dict.items()
    }


def _rename(name: str, *, reversible: bool, transitions: set[str]) -> str:
    first, _, rest = name.partition(".")
    if first in _OUTSIDE and rest:
        return f"{_OUTSIDE[first]}.{rest}"
    match = _BLOCK.fullmatch(name)
    layer = match and _LAYER.fullmatch(match["rest"])
    if match is None or (layer is None and match["shortcut"] is None):
        raise ValueError(
            f"{name!r} is not a weight of MemCNN's ResNet; from_memcnn takes the state dict of "
            "the net itself, without a prefix such as 'module.'"
        )
    stage, block = f"stages.{int(match['stage']) - 1}", int(match["block"])
    if match["side"]:
        place = f"{stage}.chain.{block - (first in transitions)}.{match['side'].lower()}"
    else:
        place = f"{stage}.transition" if reversible else f"{stage}.{block}"
        place += ".shortcut" if match["shortcut"] else ".branch"
    if layer is None:
        return f"{place}.{match['rest']}"
    kind, number, rest = layer.groups()
    return f"{place}.{'convs' if kind == 'conv' else 'norms'}.{int(number) - 1}.{rest}"
