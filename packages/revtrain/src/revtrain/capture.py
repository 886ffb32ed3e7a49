"""A function of tensors as one CUDA graph: what it launches is recorded once and then replayed.

Small networks are bound by the host that launches their kernels, not by the device; a graph is
launched as a whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

Outputs = tuple[Tensor, ...]

# Libraries choose kernels and allocate workspaces in the first calls. These are real calls, whose
# results count: a graph changes nothing but the time.
_WARM_UP = 3


class CapturedCall:
    """Calls a function, and after a few calls replays what it launched.

    The function must do all its work on the device and change tensors in place only; what it does
    on the host is done while it is captured and never again. Arguments of other shapes than the
    first call's run as they are. On other devices than CUDA there are no graphs, and every call is
    an ordinary one.

    The results of a replay are valid until the next one.

    Args:
        function: Maps tensors to tensors.
        device: Where they are.
        enabled: False for ordinary calls always.

    Attributes:
        why_not: Why calls are ordinary ones, if so.
        peak_bytes: The most bytes that were allocated while the graph was captured. Its replays
            use as many, but allocate nothing, so that no other counter sees them.

    Example:
        >>> double = CapturedCall(lambda x: (2 * x,), torch.device("cpu"))
        >>> double(torch.ones(2))
        (tensor([2., 2.]),)
        >>> double.why_not
        'the device is cpu'
    """

    def __init__(
        self, function: Callable[..., Outputs], device: torch.device, *, enabled: bool = True
    ) -> None:
        self._function = function
        self.why_not: str | None = None
        if not enabled:
            self.why_not = "it is switched off"
        elif device.type != "cuda":
            self.why_not = f"the device is {device.type}"
        self.peak_bytes = 0
        self._device = device
        self._stream = torch.cuda.Stream(device) if self.why_not is None else None
        self.reset()

    def reset(self) -> None:
        """Drops the graph; the next calls warm up and capture again.

        Needed when a tensor that the function uses has been replaced by another one. A change in
        place, such as `load_state_dict` makes, needs nothing.
        """
        self._graph: torch.cuda.CUDAGraph | None = None
        self._shapes: list[tuple[torch.Size, torch.dtype]] | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Outputs = ()
        self._calls = 0

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Calls the function, or replays it."""
        if self._stream is None or self.why_not is not None:
            return self._function(*inputs)
        shapes = [(x.shape, x.dtype) for x in inputs]
        if self._shapes is None:
            self._shapes = shapes
            self._inputs = [torch.empty_like(x) for x in inputs]
        if shapes != self._shapes:
            return self.launch(*inputs)
        for static, x in zip(self._inputs, inputs, strict=True):
            static.copy_(x)
        if self._graph is None:
            self._calls += 1
            if self._calls <= _WARM_UP or not self._capture():
                return self.launch(*self._inputs)
        assert self._graph is not None
        self._graph.replay()
        return self._outputs

    def launch(self, *inputs: Tensor) -> Outputs:
        """Calls the function from Python, also between replays; the graph stays as it is."""
        if self._stream is None or self.why_not is not None:
            return self._function(*inputs)
        # Where the graph is captured: what autograd remembers of streams must fit.
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            outputs = self._function(*inputs)
        here.wait_stream(self._stream)
        for output in outputs:
            output.record_stream(here)
        return outputs

    def _capture(self) -> bool:
        """Records the function without running it; tells whether that was possible."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        before = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            # Other threads (of a loader, say) may go on with calls that a capture forbids its own.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
        except RuntimeError as error:
            # Nothing has run yet, so nothing is lost but time. What ends a capture that has failed
            # fails, too, and leaves its stream current.
            torch.cuda.set_stream(here)
            torch.cuda.synchronize(self._device)
            self.why_not = " ".join(str(error.__context__ or error).split())
            warnings.warn(
                f"no CUDA graph can be made, so every call is launched from Python, which is "
                f"slower: {self.why_not}",
                stacklevel=3,
            )
            return False
        self.peak_bytes = max(before, torch.cuda.max_memory_allocated(self._device))
        self._graph = graph
        return True


def why_not_capture(model: nn.Module) -> str | None:
    """Returns why a network's passes must not be captured, or None.

    Example:
        >>> why_not_capture(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
        "module '1' (Dropout) draws random numbers"
        >>> why_not_capture(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    """
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "hooks on all modules run in Python"
    for name, module in model.named_modules():
        label = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{label} draws random numbers"
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return f"{label} has hooks, which run in Python"
    return None
