"""CUDA graphs that torch.compile makes of a module: mode="reduce-overhead", or "max-autotune".

The next run of such a graph takes the memory of what this one gave. In the run in which it is
recorded it does not always draw the random numbers that the generator's state would give.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from revcore.tracing import is_traced


def are_in_use() -> bool:
    """Tells whether anything has made one in this process."""
    return "torch._inductor.cudagraph_trees" in sys.modules


def lasting(x: Tensor) -> Tensor:
    """Returns `x`, copied if the next run of a graph may take its memory."""
    return x.clone() if not is_traced() and are_in_use() and x.is_cuda else x


def becomes_one(module: nn.Module) -> bool:
    """Tells whether torch.compile makes one of a module."""
    own = vars(module)
    # One that was compiled in place, or what torch.compile has made of one.
    compiled: Any = own.get("_compiled_call_impl")
    if compiled is None and "_torchdynamo_orig_callable" in own:
        compiled = module
    config = getattr(compiled, "get_compiler_config", None)
    return config is not None and bool((config() or {}).get("triton.cudagraphs"))
