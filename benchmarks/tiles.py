"""Which tiles are the fastest for the kernels of 3x3?

    python benchmarks/tiles.py --output FILE.json

Tries tiles for each of the three kernels, for the convolutions of RevNet-164's bottlenecks: whole
calls of `revmodels.conv_passes`, merging of sums included, in a CUDA graph that goes over several
batches, more than a GPU's cache holds. Before it is timed, each result is compared with torch's.
What the record calls *now* are the tiles in use. With `--write` the tables in `conv_passes` become
those of the fastest tiles, where they are faster by two percent. Needs CUDA.
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
from typing import Any

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

SIDES = {16: 32, 32: 16, 64: 8}  # of the image, by channels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TABLES = {"CONVOLVE": "convolve", "ACTIVATION": "gradients", "MATRIX": "gradients"}
ROWS = {"CONVOLVE": (32, 64, 128), "ACTIVATION": (32, 64, 128), "MATRIX": (32, 64, 128)}
WARPS = {"CONVOLVE": (2, 4, 8), "ACTIVATION": (2, 4, 8), "MATRIX": (1, 2, 4)}
STAGES = (1, 2, 3)
PROGRAMS = {"CONVOLVE": (), "ACTIVATION": (264, 528, 1056), "MATRIX": (528, 1056, 2112)}
_BYTES = 120e6
_WORTH = 0.98

Tiles = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120, help="for all of it, about")
    parser.add_argument("--write", action="store_true", help="into conv_passes.py")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, whose kernels could be timed")
    layers = [
        Layer(arguments.batch_size, channels, name)
        for channels, name in itertools.product(SIDES, DTYPES)
    ]
    started = time.perf_counter()
    for table in TABLES:
        for layer in layers:
            layer.compile(table)
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    deadline = started + arguments.seconds
    jobs = [(table, layer) for table in TABLES for layer in layers]
    rows = []
    for position, (table, layer) in enumerate(jobs):
        now = time.perf_counter()
        rows.append(layer.sweep(table, now + (deadline - now) / (len(jobs) - position)))
        print(table, layer.channels, layer.name, rows[-1]["now"], rows[-1]["best"][:3], flush=True)
    record = {"question": "Which tiles are the fastest for the kernels of 3x3?", "rows": rows}
    write_json(
        arguments.output, record | provenance(make_accelerator(cpu=False, mixed_precision="no"))
    )
    if arguments.write:
        write(rows)


class Layer:
    """One convolution with its normalization, and batches for it."""

    def __init__(self, batch_size: int, channels: int, name: str) -> None:
        side, self.channels, self.name, self.dtype = SIDES[channels], channels, name, DTYPES[name]
        shape = (batch_size, channels, side, side)
        count = max(3, round(_BYTES / (4 * torch.Size(shape).numel())))
        self.batches = [images(shape, self.dtype) for _ in range(count)]
        self.grad = images(shape, self.dtype)
        self.matrix = images((channels, channels, 3, 3), self.dtype) * 0.1
        ones = torch.ones(channels, device="cuda")
        self.by = Normalization(*passes.statistics(self.batches[0], 1e-5), ones, ones * 0.1)

    def convolve(self, x: Tensor) -> tuple[Tensor, ...]:
        """Convolves, and takes the statistics of the result."""
        moments = Moments()
        y = conv_passes.convolve(x, self.by, self.matrix, dtype=self.dtype, moments=moments)
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
            for tiles in self.choices(table):
                if tiles[3:] in (
                    (),
                    PROGRAMS[table][:1],
                ):  # a number that the compiler does not see
                    with self.using(table, tiles), mode:
                        getattr(fake, TABLES[table])(x)

    def choices(self, table: str) -> Iterator[Tiles]:
        programs = [(number,) for number in PROGRAMS[table]] or [()]
        for *tiles, more in itertools.product(ROWS[table], WARPS[table], STAGES, programs):
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
        function: Callable[[Tensor], tuple[Tensor, ...]] = getattr(self, TABLES[table])
        exact = self.exact(TABLES[table])
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
        y = F.conv2d(normal, matrix, padding=1)
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
    for table in TABLES:
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
