"""The one place that makes an Accelerator, without its traps."""

from __future__ import annotations

import os

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

from revtrain.orphan import end_with_launcher

_PRECISIONS = ("no", "bf16", "fp16")

# Ways of Accelerate to share a network, by the variables in which its launcher asks for them.
_OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class LaunchError(RuntimeError):
    """The launcher asks for what would not be done: processes, or a way to share the network."""


def make_accelerator(
    *, cpu: bool, mixed_precision: str | None, accumulate: int | None = None
) -> Accelerator:
    """Makes the Accelerator of a run.

    Args:
        cpu: Whether to ignore accelerators.
        mixed_precision: `no`, `bf16`, `fp16`, or None for what Accelerate is configured to.
        accumulate: Parts of a batch, or None for what Accelerate is configured to.

    Returns:
        An Accelerator whose number of processes is the one that was asked for.

    Raises:
        LaunchError: The launcher started, or Accelerate found, fewer processes than asked for; or
            it asks for FSDP, DeepSpeed or Megatron-LM.
        ValueError: The device cannot do this precision, or none of ours can.
    """
    end_with_launcher()
    _refuse_other_ways()
    # Accelerate keeps device and precision for the life of the process, and a second run from
    # Python may want others; there is no public way to say so. A process group stays.
    AcceleratorState._reset_state(
        reset_partial_state=not (dist.is_available() and dist.is_initialized())
    )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        # Against a plain argument the environment would win.
        gradient_accumulation_plugin=(
            None if accumulate is None else GradientAccumulationPlugin(num_steps=accumulate)
        ),
        # Our batch size is the global one. Accelerate must know, or its scheduler takes as many
        # steps as there are processes for each of the optimizer's.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    _refuse_lost_processes(accelerator.num_processes)
    if accelerator.gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps (={accelerator.gradient_accumulation_steps}) of "
            "Accelerate's settings must be at least 1: --accumulate wins over it"
        )
    if accelerator.mixed_precision not in _PRECISIONS:
        raise ValueError(
            f"mixed_precision (={accelerator.mixed_precision!r}) of Accelerate's settings must "
            f"be one of {', '.join(_PRECISIONS)}: --mixed-precision wins over it"
        )
    return accelerator


def _refuse_other_ways() -> None:
    """Raises if the network would be shared in a way that the step and the checkpoints are not for.

    On the CPU Accelerate itself would leave it out, in silence.
    """
    for variable, name in _OTHER_WAYS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise LaunchError(
                f"Accelerate is configured for {name} ({variable}={os.environ[variable]}), but "
                "revtrain shares work by DistributedDataParallel: launch it by --multi_gpu, or by "
                "a configuration with distributed_type: MULTI_GPU"
            )


def _refuse_lost_processes(found: int) -> None:
    """Raises if this would be a run of fewer processes than asked for: Accelerate is silent."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != found:
        raise LaunchError(
            f"the launcher started {asked} processes (WORLD_SIZE={asked}), but Accelerate found "
            f"{found}: for several processes on CPU pass --cpu or set ACCELERATE_USE_CPU=true"
        )
    # The signature of `accelerate launch --cpu --num_processes 2`: an address to meet at, but no
    # ranks. It starts a single process.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            "accelerate launch was asked for several processes, but started one: for several on "
            "CPU use ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m revtrain ... "
            "(or unset MASTER_ADDR if one is meant)"
        )
