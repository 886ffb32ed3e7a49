"""A run so small that it takes a second, its spelling in flags, and data of CIFAR's format."""

import os
import pickle
import subprocess
import sys

import torch

TINY = {
    "data": "digits",
    "blocks": (2, 2, 2),
    "channels": (4, 8, 8, 8),
    "epochs": 2,
    "batch_size": 200,
    "cpu": True,
    "memory": False,
}

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# Two processes for tests that are about these, and not about a launcher: imports are paid for once.
_TWO = """
import os, runpy, sys, tempfile
import sklearn.datasets, torch, torch._dynamo
import revtrain.trainer

def run(rank, store, words):
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    sys.argv = words
    if words[0] == "-m":
        del sys.argv[0]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0])

with tempfile.TemporaryDirectory() as folder:
    arguments = (f"{folder}/store", sys.argv[1:])
    torch.multiprocessing.start_processes(run, arguments, 2, start_method="fork")
"""


def as_flags(options):
    """Spells keyword arguments of TrainConfig as the command line does."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def launch(*words, **environment):
    """Runs a command line in processes of its own."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch_two(*words):
    """Runs a command line in two processes, which have a process group already."""
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return launch("-c", _TWO, *words, ACCELERATE_USE_CPU="true", **sizes)


def write_small_cifar10(root):
    """Writes 5 x 40 training images and 40 test images in the layout of the official archive."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    names = {"batches.meta": {"label_names": [f"class{i}" for i in range(10)]}}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = torch.randint(0, 256, (40, 3072), generator=generator, dtype=torch.uint8)
        names[name] = {"data": data.numpy(), "labels": [i % 10 for i in range(40)]}
    for name, content in names.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder
