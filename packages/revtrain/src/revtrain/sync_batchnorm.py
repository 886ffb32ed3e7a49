"""Batch normalization over the batch of all processes together.

Without it every process would normalize by its own slice, and a run would depend on the number of
processes. torch.nn.SyncBatchNorm does this on accelerators, but refuses tensors on the CPU, where
the tests of many processes run; so there it is written out in differentiable all-reduces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """All processes get the sum; a gradient comes from all of them, so it is a sum as well."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        torch.distributed.all_reduce(total)
        return total


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """Does on the CPU what torch.nn.SyncBatchNorm does elsewhere; slices must be of equal size."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalizes (N, C, H, W) by the statistics over N, H, W and all processes."""
        if not self.training:
            return super().forward(x_NCHW)
        world_size = torch.distributed.get_world_size()
        x = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
        mean = _SumOverProcesses.apply(x.mean((0, 2, 3))) / world_size
        centered = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centered.square().mean((0, 2, 3))) / world_size
        if self.track_running_stats:
            count = world_size * x.numel() // x.shape[1]
            self._update(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        y: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return y.to(x_NCHW.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def synchronize_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces all batch normalizations of a model, in place; the state dict keeps its keys."""
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                twin = CPUSyncBatchNorm2d(child.num_features, child.eps, child.momentum)
                twin.load_state_dict(child.state_dict())
                twin.to(child.weight.dtype)
                setattr(module, name, twin)
    return model
