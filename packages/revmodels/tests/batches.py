"""Image batches of noise for the kernels, and how far results are from the right ones."""

import torch


def batch(*shape, device, dtype=torch.float32):
    x = torch.randn(shape, device=device) * 2 + 1
    return x.to(dtype, memory_format=torch.channels_last).requires_grad_()


def relative_error(found, expected):
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
