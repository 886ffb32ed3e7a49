"""Compiling the kernels of a net before its first step."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from revmodels.fused import compile_checks, interpreted
from revmodels.launch import side_by_side


def compile_ahead(net: nn.Module, x: Tensor) -> None:
    """Compiles the kernels of a training step side by side, which takes a fraction of the time.

    Kernels are otherwise compiled one after the other when they run first, which takes up to half a
    minute for a deep net; what was compiled once stays in Triton's cache on this machine. This
    runs a step on tensors without data: nothing is computed and nothing changes. Where there
    are no kernels to compile (see `revmodels.set_fused`), nothing is done.

    Args:
        net: In training mode, on a GPU and in `channels_last`.
        x: A batch as it will come, (N, C, H, W). Autocast should be as it will be, too.

    Example:
        >>> import torch
        >>> import revmodels
        >>> net = revmodels.create_model("revnet38")
        >>> compile_ahead(revmodels.set_fused(net, True), torch.zeros(2, 3, 32, 32))
    """
    fused = any(module.__dict__.get("fused") for module in net.modules())
    if not fused or not (x.is_cuda or interpreted()):
        return
    # A net may need data, to look at a value, or be too deep. What came before is compiled then.
    with suppress(Exception), side_by_side() as mode:
        compile_checks(x.device.type)
        memo: dict[int, Any] = {id(b): mode.from_tensor(b) for b in net.buffers()}
        for p in net.parameters():
            memo[id(p)] = nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad)
        twin = copy.deepcopy(net, memo)
        # What other libraries put in its place (accelerate does) may belong to the net itself.
        twin.__dict__.pop("forward", None)
        twin(mode.from_tensor(x)).sum().backward()
