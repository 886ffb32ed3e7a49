"""The most memory that was in use."""

from __future__ import annotations

import sys

import torch

if sys.platform != "win32":
    import resource


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new measurement, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device, *graph_bytes: int) -> int | None:
    """Returns bytes, or None where nothing counts them.

    On CUDA these are the tensors on the device since `reset_peak_memory`; on the CPU all that the
    process ever had in memory, its libraries included. Replays of CUDA graphs are not counted, so
    `graph_bytes` are the peaks of their captures.
    """
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(device), *graph_bytes)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
