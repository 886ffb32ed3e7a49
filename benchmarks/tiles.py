"""Which tiles are the fastest for the kernels of convolutions?

    python benchmarks/tiles.py --output FILE.json

Tries tiles for kernels of 3x3 and for those of the forward pass of 1x1, for the convolutions of
RevNet-164's bottlenecks: whole calls of `revmodels.conv_passes`, merging of sums included, in a
CUDA graph that goes over several batches, more than a GPU's cache holds. Before it is timed, each
result is compared with torch's. What the record calls *now* are the tiles in use. With `--write`
the tables in `conv_passes` become those of the fastest tiles, where they are faster by two percent.
Needs CUDA.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from batchnorm import in_a_graph
from torch import Tensor

from revmodels import conv_passes, passes
from revmodels.launch import side_by_side
from revmodels.moments import Moments
from revmodels.passes import Normalization
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.provenance import provenance

SIDES = {16: 32, 32: 16, 64: 8}  # of the image, by channels inside a bottleneck
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = (32, 64, 128)
STAGES = (1, 2, 3)


class Table(NamedTuple):
    """What is looked for: in which function, for which convolution of a bottleneck."""

    function: str
    place: str
    warps: tuple[int, ...]
    programs: tuple[int, ...] = ()


TABLES = {
    "NARROW": Table("convolve", "first", (2, 4, 8)),
    "CONVOLVE": Table("convolve", "middle", (2, 4, 8)),
    "WIDEN": Table("convolve", "last", (2, 4, 8)),
    "ACTIVATION": Table("gradients", "middle", (2, 4, 8), (264, 528, 1056)),
    "MATRIX": Table("gradients", "middle", (1, 2, 4), (528, 1056, 2112)),
}
_BYTES = 120e6
_WORTH = 0.98

Tiles = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--seconds", type=float, default=120, help="for all of it, about")
    parser.add_argument("--write", action="store_true", help="into conv_passes.py")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, whose kernels could be timed")
    layers = [
        Layer(arguments.batch_size, channels, name, place)
        for place in ("first", "middle", "last")
        for channels, name in itertools.product(SIDES, DTYPES)
    ]
    jobs = [
        (table, layer)
        for table in arguments.tables
        for layer in layers
        if layer.place == TABLES[table].place
    ]
    started = time.perf_counter()
    for table, layer in jobs:
        layer.compile(table)
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    deadline = started + arguments.seconds
    rows = []
    for position, (table, layer) in enumerate(jobs):
        now = time.perf_counter()
        rows.append(layer.sweep(table, now + (deadline - now) / (len(jobs) - position)))
        print(table, layer.channels, layer.name, rows[-1]["now"], rows[-1]["best"][:3], flush=True)
    record = {
        "question": "Which tiles are the fastest for the kernels of convolutions?",
        "rows": rows,
    }
    write_json(
        arguments.output, record | provenance(make_accelerator(cpu=False, mixed_precision="no"))
    )
    if arguments.write:
        write(rows)


class Layer:
    """One convolution with its normalization, and batches for it.

    The first of a bottleneck reads a stream, which is float32, and the last one adds to one.
    """

    def __init__(self, batch_size: int, channels: int, name: str, place: str) -> None:
        side, self.channels, self.name, self.dtype = SIDES[channels], channels, name, DTYPES[name]
        self.place = place
        inputs = channels * 4 if place == "first" else channels
        outputs = channels * 4 if place == "last" else channels
        shape = (batch_size, inputs, side, side)
        count = max(3, round(_BYTES / (4 * torch.Size(shape).numel())))
        of_x = torch.float32 if place == "first" else self.dtype
        self.batches = [images(shape, of_x) for _ in range(count)]
        result = (batch_size, outputs, side, side)
        self.grad = images(result, self.dtype)
        self.base = images(result, torch.float32) if place == "last" else None
        size = 3 if place == "middle" else 1
        self.matrix = images((outputs, inputs, size, size), self.dtype) * 0.1
        ones = torch.ones(inputs, device="cuda")
        self.by = Normalization(*passes.statistics(self.batches[0], 1e-5), ones, ones * 0.1)

    def convolve(self, x: Tensor) -> tuple[Tensor, ...]:
        """Convolves, and takes the statistics of the result."""
        moments = Moments()
        y = conv_passes.convolve(
            x, self.by, self.matrix, dtype=self.dtype, base=self.base, moments=moments
        )
        return (y, *passes.statistics(y, 1e-5, moments=moments))

    def gradients(self, x: Tensor) -> tuple[Tensor, ...]:
        return conv_passes.gradients(  # type: ignore[return-value]  # none is None
            self.grad, x, self.by, self.matrix, dtype=self.dtype, needs_x=True
        )

    def compile(self, table: str) -> None:
        """Compiles the kernels of all tiles, side by side."""
        fake = copy.copy(self)
        with side_by_side() as mode:
            x, fake.grad = map(mode.from_tensor, (self.batches[0], self.grad))
            fake.base = None if self.base is None else mode.from_tensor(self.base)
            for tiles in self.choices(table):
                # The compiler does not see the number of programs.
                if tiles[3:] in ((), TABLES[table].programs[:1]):
                    with self.using(table, tiles), mode:
                        getattr(fake, TABLES[table].function)(x)

    def choices(self, table: str) -> Iterator[Tiles]:
        programs = [(number,) for number in TABLES[table].programs] or [()]
        for *tiles, more in itertools.product(ROWS, TABLES[table].warps, STAGES, programs):
            yield (*tiles, *more)

    @contextmanager
    def using(self, table: str, tiles: Tiles) -> Iterator[None]:
        entries = getattr(conv_passes, table)
        before = entries[self.channels]
        entries[self.channels] = (tiles, tiles)
        try:
            yield
        finally:
            entries[self.channels] = before

    def sweep(self, table: str, deadline: float) -> dict[str, Any]:
        """Times the tiles in use, and then others until the deadline."""
        name = TABLES[table].function
        function: Callable[[Tensor], tuple[Tensor, ...]] = getattr(self, name)
        exact = self.exact(name)
        now: Tiles = getattr(conv_passes, table)[self.channels][self.dtype != torch.float32]
        times: dict[Tiles, float] = {}
        wrong = {}
        for tiles in [now, *self.choices(table)]:
            if tiles in times or (times and time.perf_counter() > deadline):
                continue
            with self.using(table, tiles):
                errors = map(relative_error, function(self.batches[0]), exact)
                if (worst := max(errors)) > 2e-2:
                    wrong[str(tiles)] = worst
                    continue
                times[tiles] = in_a_graph(function, self.batches)
        return {
            "table": table,
            "channels": self.channels,
            "dtype": self.name,
            "now": [times.get(now), now],
            "best": sorted((microseconds, tiles) for tiles, microseconds in times.items())[:10],
            "tried": len(times),
            "wrong": wrong,
        }

    def exact(self, of: str) -> tuple[Tensor, ...]:
        """Returns what the kernels should compute, in float64."""
        x = self.batches[0].double().requires_grad_()
        weight, bias = (t.double().requires_grad_() for t in self.by[2:])
        matrix = self.matrix.double().requires_grad_()
        normal = F.batch_norm(x, None, None, weight, bias, training=True).relu()
        y = F.conv2d(normal, matrix, padding=matrix.shape[-1] // 2)
        if self.base is not None:
            y = y + self.base
        if of == "convolve":
            variance, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
            return y.detach(), mean, (variance + 1e-5).rsqrt()
        return torch.autograd.grad(y, (x, weight, bias, matrix), self.grad.double())


def images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype, memory_format=torch.channels_last)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the fastest tiles into the tables of `conv_passes`."""
    file = Path(conv_passes.__file__)
    text = file.read_text(encoding="utf-8")
    for table in dict.fromkeys(row["table"] for row in rows):
        entries: dict[int, list[Tiles]] = {channels: [] for channels in SIDES}
        for row in rows:
            if row["table"] == table:
                (before, now), (fastest, tiles) = row["now"], row["best"][0]
                worth = before is None or fastest < _WORTH * before
                entries[row["channels"]].append(tiles if worth else now)
        lines = "".join(f"    {channels}: {tuple(each)},\n" for channels, each in entries.items())
        pattern = rf"^{table} = \{{\n.*?^\}}\n"
        new = f"{table} = {{\n{lines}}}\n"
        text = re.sub(pattern, lambda _, new=new: new, text, flags=re.DOTALL | re.MULTILINE)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
