"""How do memory and time of a training step grow with depth, reversing and stored?

    python benchmarks/depth.py --model revnet110 --depths 1 2 4 8 16 32 --output FILE.json

Both ways are switches of one network and are timed in turns within one run. The images are random
numbers: they cost what real ones cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator

from revtrain.files import write_json
from revtrain.memory import compare_memory, memory_json
from revtrain.net import NetSpec
from revtrain.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet110", help="gives block and channels")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8], metavar="BLOCKS")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    if not arguments.output.parent.is_dir():
        parser.error(f"--output (={arguments.output}) is in a folder that does not exist")
    accelerator = Accelerator(cpu=arguments.cpu, mixed_precision=arguments.mixed_precision)
    spec = NetSpec.of(arguments.model, num_classes=10, in_channels=3)
    size = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    x = torch.randn(size, device=accelerator.device)
    labels = torch.randint(10, size[:1], device=accelerator.device)
    costs = compare_memory(spec, x, labels, accelerator, arguments.depths)
    write_json(arguments.output, memory_json(spec, x, costs) | provenance(accelerator))


if __name__ == "__main__":
    main()
