"""What do BatchNorm, ReLU and a convolution cost, one by one and in our kernels?

    python benchmarks/normalized_conv.py --output FILE.json

Times them for each shape that they have in the branches of RevNet-164 and RevNet-38: "first" is the
convolution that reads a float32 stream, "last" the one that adds its result to a stream.
"passes" has normalization and ReLU in the kernels of `revmodels.passes` and torch's convolution,
"fused" the kernels of `revmodels.conv_passes`. Each is captured in a CUDA graph that goes over
several batches, more than a GPU's cache holds. Needs CUDA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batchnorm import in_a_graph
from torch import Tensor, nn

from revmodels import conv_passes, passes, set_fused
from revmodels.batchnorm import batch_norm_relu
from revmodels.normalized_conv import norm_relu_conv
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.provenance import provenance

# Channels of the input and the output, and side of the image.
BOTTLENECKS = {
    ("first", 1): [(64, 16, 32), (128, 32, 16), (256, 64, 8)],
    ("middle", 3): [(16, 16, 32), (32, 32, 16), (64, 64, 8)],
    ("last", 1): [(16, 64, 32), (32, 128, 16), (64, 256, 8)],
}
_BASIC = [(16, 16, 32), (32, 32, 16), (56, 56, 8)]
SHAPES = {
    "revnet164": BOTTLENECKS,
    "revnet38": {("first", 3): _BASIC, ("last", 3): _BASIC},
}
_BYTES = 120e6  # of batches that a graph goes over: more than the cache of an H100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--precision", nargs="+", default=["bf16", "no"], choices=["no", "bf16"])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, whose kernels could be timed")
    rows = []
    for precision in arguments.precision:
        for net in arguments.nets:
            for (place, size), shapes in SHAPES[net].items():
                for channels, outputs, side in shapes:
                    shape = (arguments.batch_size, channels, side, side)
                    layer = Layer(shape, outputs, place, size, precision)
                    rows.append(layer.measure())
                    show(rows[-1])
    record = {
        "question": "What do BatchNorm, ReLU and a convolution cost?",
        "microseconds": rows,
    }
    write_json(
        arguments.output, record | provenance(make_accelerator(cpu=False, mixed_precision="no"))
    )


class Layer:
    """One normalization with its convolution, and batches for it."""

    def __init__(
        self, shape: tuple[int, int, int, int], outputs: int, place: str, size: int, precision: str
    ) -> None:
        batch, channels, side, _ = shape
        self.place, self.precision, half = place, precision, precision == "bf16"
        self.dtype = torch.bfloat16 if half else torch.float32
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, outputs, size, padding=size // 2, bias=False)
        nn.Sequential(self.norm, self.conv).to("cuda", memory_format=torch.channels_last)
        self.conv.to(self.dtype)  # as revtrain casts the weights of a step
        set_fused(self.norm, True)
        of_x = torch.float32 if place == "first" else self.dtype
        count = max(3, round(_BYTES / (4 * torch.Size(shape).numel())))
        self.batches = [images(shape, of_x) for _ in range(count)]
        # A last convolution's result goes to a stream, and its gradient comes from one.
        of_y = torch.float32 if place == "last" else self.dtype
        self.stream = images((batch, outputs, side, side), of_y)
        self.shape = [*shape, outputs]

    def plain(self, x: Tensor) -> Tensor:
        return self.end(self.conv(F.relu(self.norm(x), inplace=True)))

    def passes(self, x: Tensor) -> Tensor:
        return self.end(self.conv(batch_norm_relu(self.norm, x)))

    def end(self, y: Tensor) -> Tensor:
        return self.stream + y if self.place == "last" else y

    def fused(self, x: Tensor) -> Tensor:
        # As a branch does, without the coupling that says so.
        y = norm_relu_conv(self.norm, self.conv, x)
        return self.end(y)

    def both(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        wanted = (self.norm.weight, self.norm.bias, self.conv.weight)

        def run(x: Tensor) -> Any:
            x = x.detach().requires_grad_()
            with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype != torch.float32):
                y = function(x)
            return torch.autograd.grad(y, (x, *wanted), self.stream)

        return run

    def forward(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            with (
                torch.no_grad(),
                torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype != torch.float32),
            ):
                return function(x)

        return run

    def measure(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "place": self.place,
            "kernel_size": self.conv.kernel_size[0],
            "precision": self.precision,
            "shape": self.shape,
        }
        for name in ("plain", "passes", "fused"):
            function = getattr(self, name)
            row[name] = {
                "forward": in_a_graph(self.forward(function), self.batches),
                "forward and backward": in_a_graph(self.both(function), self.batches),
            }
        for name, kernel in self.kernels().items():
            row["fused"][name] = in_a_graph(kernel, self.batches)
        return row

    def kernels(self) -> dict[str, Callable[[Tensor], Any]]:
        """The forward pass with statistics that are there, and the backward pass."""
        statistics = passes.statistics(self.batches[0], self.norm.eps)
        affine = (self.norm.weight.detach(), self.norm.bias.detach())
        rest = (passes.Normalization(*statistics, *affine), self.conv.weight.detach())
        base = self.stream if self.place == "last" else None
        # The first convolution of a branch adds its gradient to that of the stream.
        of_x = self.batches[0] if self.place == "first" else None
        kwargs: dict[str, Any] = {"dtype": self.dtype}
        return {
            "convolve": lambda x: conv_passes.convolve(x, *rest, base=base, **kwargs),
            "without that of x": lambda x: conv_passes.gradients(
                self.stream, x, *rest, needs_x=False, **kwargs
            ),
            "gradients": lambda x: conv_passes.gradients(
                self.stream, x, *rest, needs_x=True, base=of_x, **kwargs
            ),
        }


def images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype, memory_format=torch.channels_last)


def show(row: dict[str, Any]) -> None:
    print(row["precision"], row["place"], row["kernel_size"], row["shape"])
    for kind in ("plain", "passes", "fused"):
        print(f"  {kind}", {name: round(value, 1) for name, value in row[kind].items()})


if __name__ == "__main__":
    main()
