"""Training on two processes, each with half of the batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from conformance.adapters import Adapter, CannotAskError
from conformance.catalog import ADAPTERS
from conformance.questions import Observed, WrongError, compare, first_line, question
from conformance.ranks import WORLD, on_two_processes
from conformance.subject import Maker, Subject, loss_of, mlp, normed

THEME = "Two processes"


def _expected(subject: Subject, steps: int) -> dict[str, Any]:
    """Makes the same steps on the whole batch, with plain autograd in one process."""
    twin = subject.plain_twin()
    for _ in range(steps):
        parts = twin(twin.x.detach()).chunk(WORLD)
        (torch.stack([*map(loss_of, parts)]).sum() / WORLD).backward()
    return twin.observe()


def _ddp(rank: int, name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Makes two steps with DistributedDataParallel, and compares what has accumulated."""
    skipped = options.pop("no_sync", False)
    subject = Subject(ADAPTERS[name], device, shape=(6, 4))
    expected = _expected(subject, 2)
    part = subject.x.detach().chunk(WORLD)[rank].requires_grad_()
    net = DistributedDataParallel(subject.net, **options)
    for step in range(2):
        with net.no_sync() if skipped and step == 0 else nullcontext():
            loss_of(net(part.clone())).backward()
    compare(subject.observe(), expected)


def _ask_ddp(adapter: Adapter, device: torch.device, **options: Any) -> Observed:
    on_two_processes(_ddp, adapter.name, device, options)
    return {}


@question(THEME, alone=True)
def ddp(adapter: Adapter, device: torch.device) -> Observed:
    """DistributedDataParallel."""
    return _ask_ddp(adapter, device)


@question(THEME, alone=True)
def ddp_find_unused(adapter: Adapter, device: torch.device) -> Observed:
    """DistributedDataParallel with `find_unused_parameters`."""
    return _ask_ddp(adapter, device, find_unused_parameters=True)


@question(THEME, alone=True)
def ddp_static_graph(adapter: Adapter, device: torch.device) -> Observed:
    """DistributedDataParallel with `static_graph`."""
    return _ask_ddp(adapter, device, static_graph=True)


@question(THEME, alone=True)
def ddp_bucket_view(adapter: Adapter, device: torch.device) -> Observed:
    """DistributedDataParallel with `gradient_as_bucket_view`."""
    return _ask_ddp(adapter, device, gradient_as_bucket_view=True)


def _overlap(rank: int, name: str, device: torch.device) -> None:
    """Notes when buckets leave and when the first block's gradients are ready."""
    del rank
    subject = Subject(ADAPTERS[name], device, shape=(6, 4), depth=6)
    events: list[str] = []
    next(subject.pairs[0][0].parameters()).register_hook(lambda _: events.append("first block"))
    whole, dist._DEFAULT_FIRST_BUCKET_BYTES = dist._DEFAULT_FIRST_BUCKET_BYTES, 64
    try:
        net = DistributedDataParallel(subject.net, bucket_cap_mb=1e-4)
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = whole

    def communicate(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        events.append("bucket")
        return allreduce_hook(state, bucket)  # type: ignore[arg-type]

    communicate.__annotations__.clear()  # DDP looks at them, and would find strings
    net.register_comm_hook(None, communicate)
    for _ in range(2):  # the buckets are made anew after the first step
        events.clear()
        loss_of(net(subject.x.clone())).backward()
    before = events.index("first block")
    if before < 5:
        raise WrongError(f"{before} of {len(events) - 1} all-reduces before the first block's turn")


@question(THEME, alone=True)
def ddp_overlap(adapter: Adapter, device: torch.device) -> Observed:
    """DistributedDataParallel sends the last blocks' gradients before the first's are ready."""
    on_two_processes(_overlap, adapter.name, device)
    return {}


@question(THEME, alone=True)
def ddp_no_sync(adapter: Adapter, device: torch.device) -> Observed:
    """DistributedDataParallel, the first of two steps under `no_sync`."""
    return _ask_ddp(adapter, device, no_sync=True)


def _fsdp(rank: int, name: str, device: torch.device, branch: Maker) -> None:
    adapter = ADAPTERS[name]
    subject = Subject(adapter, device, branch, shape=(6, 4))
    expected = _expected(subject, 2)
    part = subject.x.detach().chunk(WORLD)[rank].requires_grad_()
    _refuse_where_plain_fails(subject.plain_twin(), part)
    _shard(subject)
    for _ in range(2):
        loss_of(subject.net(part.clone())).backward()
    for parameter in subject.parameters.values():
        gather = getattr(parameter.grad, "full_tensor", None)
        if gather is not None:
            parameter.grad = gather()
    compare(subject.observe(), expected)


def _shard(subject: Subject) -> None:
    # Seconds to import, which no other question needs.
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh(subject.x.device.type, (WORLD,))
    for part in (*subject.adapter.blocks(subject.net), subject.net):
        fully_shard(part, mesh=mesh)


def _refuse_where_plain_fails(twin: Subject, part: Tensor) -> None:
    try:
        _shard(twin)
        loss_of(twin.net(part.clone())).backward()
    except Exception as error:
        raise CannotAskError(f"FSDP2 fails on plain autograd too: {first_line(error)}") from error


@question(THEME, alone=True, gpus=WORLD)
def fsdp2(adapter: Adapter, device: torch.device) -> Observed:
    """FSDP2, `fully_shard` around each block."""
    if device.type == "cuda" and torch.cuda.device_count() < WORLD:
        # With gloo a process ends by a signal, with plain autograd and torch 2.11, too.
        raise CannotAskError("FSDP2 on GPUs needs NCCL, which needs a GPU for each process")
    on_two_processes(_fsdp, adapter.name, device, mlp)
    return {}


def _synced(width: int, out: int) -> nn.Module:
    net: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(normed(width, out))
    return net


def _sync_batch_norm(rank: int, name: str, device: torch.device) -> None:
    subject = Subject(ADAPTERS[name], device, _synced, shape=(6, 4))
    twin = Subject(ADAPTERS[name], device, normed, shape=(6, 4))
    expected = _expected(twin, 1)
    part = subject.x.detach().chunk(WORLD)[rank].requires_grad_()
    net = DistributedDataParallel(subject.net)
    loss_of(net(part.clone())).backward()
    compare(subject.observe(), expected)


@question(THEME, alone=True)
def sync_batch_norm(adapter: Adapter, device: torch.device) -> Observed:
    """SyncBatchNorm: gradients and statistics are those of the whole batch."""
    if device.type != "cuda":
        raise CannotAskError("SyncBatchNorm works on GPUs alone")
    on_two_processes(_sync_batch_norm, adapter.name, device)
    return {}
