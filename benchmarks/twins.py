"""Is training with the fixed-point scheme the same, bit for bit, reversed and stored?

    python benchmarks/twins.py --data cifar10 --steps 1000 --output FILE.json

Two networks with equal weights take the same batches; one reverses its blocks, the other stores its
activations. The record holds the losses of every step, the first step at which they differ (none,
if the claim holds), and the largest difference of weights at the end. `--scheme additive` shows
what the rounding of the ordinary scheme does. The environment variable REVDATA_DIR names the folder
of the data.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from ways import WAYS

import revcore
from revdata import Loader
from revtrain.data import load_images, make_loader
from revtrain.files import write_json
from revtrain.launch import make_accelerator
from revtrain.meter import Meter
from revtrain.net import NetSpec, to_device
from revtrain.optim import make_optimizer, make_scheduler
from revtrain.provenance import provenance
from revtrain.recipe import Recipe, load_recipe
from revtrain.step import TrainStep

SCHEMES = {"fixed-point": "revcore, fixed point", "additive": "revcore"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="revnet38")
    parser.add_argument("--blocks", type=int, nargs="+", help="instead of the net's own")
    parser.add_argument("--channels", type=int, nargs="+", help="instead of the net's own")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--no-verify", action="store_true", help="read repackaged files")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--scheme", default="fixed-point", choices=list(SCHEMES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    # Otherwise cuDNN may add up gradients in another order each time.
    torch.backends.cudnn.deterministic = True
    accelerator = make_accelerator(cpu=arguments.cpu, mixed_precision=arguments.precision)
    images = load_images(
        arguments.data, "train", data_dir=None, verify=not arguments.no_verify, download=False
    )
    recipe = replace(load_recipe(arguments.recipe), steps=arguments.steps, epochs=None)
    spec = NetSpec.of(
        arguments.model,
        len(images.classes),
        images.images.shape[1],
        tuple(arguments.blocks) if arguments.blocks else None,
        tuple(arguments.channels) if arguments.channels else None,
    )
    losses, weights = {}, {}
    for reversing in (True, False):
        loader = make_loader(
            images,
            recipe.batch_size,
            accelerator,
            train=True,
            augment=recipe.augment,
            seed=arguments.seed,
        )
        net = to_device(WAYS[SCHEMES[arguments.scheme]].build(spec, arguments.seed), loader.device)
        revcore.set_reversing(net, reversing)
        losses[reversing] = train(net, loader, recipe, accelerator)
        weights[reversing] = [value.double().cpu() for value in net.state_dict().values()]
    pairs = zip(losses[True], losses[False], strict=True)
    differing = [step for step, (one, other) in enumerate(pairs, start=1) if one != other]
    apart = max(
        float((one - other).abs().max())
        for one, other in zip(weights[True], weights[False], strict=True)
    )
    record = {
        "question": "Is training the same, bit for bit, reversed and stored?",
        "scheme": arguments.scheme,
        "model": spec.to_json(),
        "data": arguments.data,
        "batch_size": recipe.batch_size,
        "steps": arguments.steps,
        "first_difference": differing[0] if differing else None,
        "largest_weight_difference": apart,
        "losses_reversed": losses[True],
        "losses_stored": losses[False],
    }
    write_json(arguments.output, record | provenance(accelerator))
    print(f"{arguments.scheme}: first difference {record['first_difference']}, weights {apart:g}")


def train(
    net: torch.nn.Module, loader: Loader, recipe: Recipe, accelerator: Accelerator
) -> list[float]:
    """Trains; returns the loss of each step."""
    assert recipe.steps is not None
    optimizer = make_optimizer(net, recipe)
    scheduler = make_scheduler(optimizer, recipe, recipe.steps)
    prepared = accelerator.prepare(net, optimizer, scheduler)
    step = TrainStep(*prepared, accelerator, label_smoothing=recipe.label_smoothing)
    meters: list[Meter] = []
    epoch = 0
    while len(meters) < recipe.steps:
        loader.set_epoch(epoch)
        for x, labels in loader:
            meters.append(Meter(accelerator.device))
            step(x, labels, meters[-1])
            if len(meters) == recipe.steps:
                break
        epoch += 1
    step.check()
    accelerator.free_memory()
    return [meter.read().loss for meter in meters]


if __name__ == "__main__":
    main()
