"""The residual branches: pre-activation stacks of convolutions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from revcore import get_destination, self_contained
from revmodels.batchnorm import batch_norm_relu
from revmodels.fused import is_fused
from revmodels.normalized_conv import norm_relu_conv

BlockKind = Literal["basic", "bottleneck"]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Creates the batch normalization that all nets share."""
    # With the epsilon of MemCNN's six nets, which is torch's, so that their weights give the same
    # outputs here.
    return nn.BatchNorm2d(channels)


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Creates a convolution that keeps the size of the image, up to its stride."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


@self_contained
class ConvNorm(nn.Sequential):
    """Creates a convolution and a BatchNorm, and with `activate` a ReLU."""

    def __init__(self, convolution: nn.Conv2d, *, activate: bool = False) -> None:
        super().__init__(convolution, batch_norm(convolution.out_channels))
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, C, H, W)` to `(N, C', H', W')`."""
        convolution, norm = self
        return batch_norm_relu(norm, convolution(x), relu=self.activate)


@self_contained
class Branch(nn.Module):
    r"""Creates a pre-activation residual branch, (BatchNorm, ReLU, convolution) repeated.

    References:
        Identity Mappings in Deep Residual Networks (He et al., 2016), figure 1b.
        https://arxiv.org/abs/1603.05027

    Args:
        kernels: One `(in_channels, out_channels, kernel_size, stride)` for each convolution.
        activate: Whether to begin with BatchNorm and ReLU. The first block after the stem does
            not, because the stem ends with them.
    """

    def __init__(self, *kernels: tuple[int, int, int, int], activate: bool = True) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(*kernel) for kernel in kernels)
        self.norms = nn.ModuleList(
            batch_norm(kernel[0]) if activate or position else nn.Identity()
            for position, kernel in enumerate(kernels)
        )
        self.activate = activate

    @property
    def adds(self) -> bool:
        """Whether a kernel may add the result to a stream; see `revcore.get_destination`."""
        return is_fused(self.norms[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, C, H, W)` to `(N, C', H', W')`."""
        # A subclass may do something to the results.
        destination = get_destination(self) if type(self) is Branch else None
        last = len(self.convs) - 1
        for position, (norm, convolution) in enumerate(zip(self.norms, self.convs, strict=True)):
            if self.activate or position:
                x = norm_relu_conv(
                    *(norm, convolution, x),
                    normalized_next=position < last,
                    result_to=destination if position == last else None,
                    gradient_to=destination if position == 0 else None,
                )
            else:
                x = convolution(x)
        return x


def make_branch(
    kind: BlockKind, in_channels: int, channels: int, stride: int = 1, *, activate: bool = True
) -> Branch:
    """Creates a basic branch (two 3x3 convolutions) or a bottleneck (1x1, 3x3, 1x1).

    Args:
        kind: `"basic"` or `"bottleneck"`.
        in_channels: Channels of the input.
        channels: Channels inside; the output has `channels * expansion(kind)`.
        stride: Stride of the 3x3 convolution that changes the size of the image.
        activate: Whether to begin with BatchNorm and ReLU.
    """
    if kind == "basic":
        return Branch(
            (in_channels, channels, 3, stride), (channels, channels, 3, 1), activate=activate
        )
    return Branch(
        (in_channels, channels, 1, 1),
        (channels, channels, 3, stride),
        (channels, channels * expansion(kind), 1, 1),
        activate=activate,
    )


def expansion(kind: BlockKind) -> int:
    """Returns how many times wider than its inner convolutions a block's output is."""
    return 1 if kind == "basic" else 4
