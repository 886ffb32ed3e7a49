"""One optimizer step; nothing in it waits for the device.

On one CUDA device the whole of it (forward and backward pass, mask, optimizer) is one CUDA graph;
elsewhere the same function is called from Python. The scheduler and the learning rate are the
host's: a number that is copied to the device before each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn

from revcore import track_drift
from revmodels import compile_ahead, set_fused
from revtrain.accumulate import forward_backward
from revtrain.capture import CapturedCall, why_not_capture
from revtrain.cast_weights import CastWeights
from revtrain.guard import Guard
from revtrain.meter import Meter
from revtrain.net import unwrap
from revtrain.nonfinite import NonFiniteLossError, find_origin

# Reading the guard waits for the device, so it is read once in so many steps.
_STEPS_BETWEEN_CHECKS = 100
# A loss scale starts at 2^16 and is halved at each overflow: then it is below any use.
_OVERFLOWS = 32


class TrainStep:
    """Takes optimizer steps with a prepared network.

    A step whose loss or gradients are not finite changes neither weights nor buffers nor the
    optimizer's state, and ends the run with an error within the next hundred steps. With float16,
    where the loss scale has to find its size, it is skipped; only many in a row are an error.

    Args:
        model: What `accelerator.prepare` made of the network; so the optimizer and the scheduler.
        optimizer: Changes the weights. A fused one, such as `make_optimizer` makes.
        scheduler: Changes the learning rate, once a step.
        accelerator: Runs the backward pass.
        label_smoothing: Share of the target that is spread evenly over all classes.
        graph: Whether to make a CUDA graph of the step where that can be done.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        scheduler: AcceleratedScheduler,
        accelerator: Accelerator,
        *,
        label_smoothing: float,
        graph: bool = True,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._accelerator = accelerator
        self._label_smoothing = label_smoothing
        self._calls = 0
        device = accelerator.device
        self._lrs = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        patience = 1 if accelerator.scaler is None else _OVERFLOWS
        self._guard = Guard(model, device, patience)
        self._step = CapturedCall(self._eager, device, enabled=graph)
        if self._step.why_not is None:
            self._step.why_not = _why_not(model, accelerator)
        # From the first step on, so that the steps before the capture have the same bits.
        set_fused(model, self._step.why_not is None)
        self._weights: CastWeights | None = None
        # Otherwise parts of a batch, or processes, would add up their gradients in low precision.
        alone = accelerator.num_processes == 1 and accelerator.gradient_accumulation_steps == 1
        if alone and accelerator.mixed_precision == "bf16":
            self._weights = CastWeights(model, torch.bfloat16)

    @property
    def why_no_graph(self) -> str | None:
        """Why the step is no CUDA graph, if so."""
        return self._step.why_not

    @property
    def captured(self) -> bool:
        """Whether the step is a CUDA graph by now."""
        return self._step.captured

    @property
    def peak_bytes(self) -> int:
        """The most bytes allocated while the graph was captured; its replays use as many."""
        return self._step.peak_bytes

    @property
    def skipped(self) -> bool:
        """Whether the last step was bad, and so changed nothing. Waits for the device."""
        return self._guard.bad_steps() > 0

    def reset(self) -> None:
        """Drops the CUDA graph, to be made anew by the next steps.

        Needed after parameters, buffers or the optimizer's state have been replaced by other
        tensors, as `Optimizer.load_state_dict` does; not after a copy in place.
        """
        self._step.reset()

    def __call__(self, x: Tensor, labels: Tensor, meter: Meter) -> None:
        """Takes one step on this process's slice of a batch, and adds its loss to `meter`.

        In `revcore.track_drift()` it is launched from Python: the same arithmetic.

        Raises:
            NonFiniteLossError: A step before, or this one, was bad.
        """
        for lr, group in zip(self._lrs, self._optimizer.param_groups, strict=True):
            lr.fill_(group["lr"])
        if self._calls == 0 and self.why_no_graph is None:
            with self._cast_weights(), self._accelerator.autocast():
                compile_ahead(unwrap(self._model, self._accelerator), x)
        # A replay runs nothing on the host, and so measures nothing.
        measured = track_drift.current is not None
        take = self._step.launch if measured else self._step
        loss, logits, labels = take(x, labels)
        self._scheduler.step()
        meter.update(loss, logits, labels)
        self._calls += 1
        if self._calls % _STEPS_BETWEEN_CHECKS == 0:
            self.check()

    def check(self) -> None:
        """Waits for the device, and raises if a step was bad. All processes call it together.

        Raises:
            NonFiniteLossError: The loss or a gradient was not finite; the message names the step,
                the process and the first module.
        """
        bad_steps = self._guard.bad_steps()
        if bad_steps >= self._guard.patience:
            # The scheduler has counted all steps of this run, also those before it was resumed.
            step = self._scheduler.scheduler.last_epoch - bad_steps + 1
            raise NonFiniteLossError(self._explain(step), step)

    def _eager(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step; returns loss, logits and labels."""
        try:
            return self._take(x, labels)
        except BaseException:
            # Gradients of a step that was never finished, or never run, must not count.
            self._optimizer.optimizer.zero_grad()
            raise

    def _take(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        guard, optimizer = self._guard, self._optimizer
        x, labels = guard.hold(x, labels)
        saved = guard.save_buffers()
        with self._cast_weights():
            loss, logits = forward_backward(
                self._model, x, labels, self._cross_entropy, self._accelerator, poison=guard.poison
            )
        if self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(optimizer)
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        found_inf = guard.judge(grads, saved)
        with self._on_device(found_inf):
            optimizer.step()
        optimizer.zero_grad()
        # One of a bad step would make the averages useless.
        return loss.masked_fill(~loss.isfinite(), 0.0), logits, labels

    def _cast_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self._weights is None else self._weights.in_use()

    def _loss(self, net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return self._cross_entropy(net(x), labels)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)

    @contextmanager
    def _on_device(self, found_inf: Tensor) -> Iterator[None]:
        """Lets the optimizer read rates and mask from the device; outside of it they are numbers.

        So schedulers and checkpoints see what they always see.
        """
        optimizer = self._optimizer.optimizer
        groups = optimizer.param_groups
        lrs = [group["lr"] for group in groups]
        for group, lr in zip(groups, self._lrs, strict=True):
            group["lr"] = lr
        if self._accelerator.scaler is None:  # which sets and removes its own
            optimizer.found_inf = found_inf
        try:
            yield
        finally:
            for group, lr in zip(groups, lrs, strict=True):
                group["lr"] = lr
            if self._accelerator.scaler is None:
                del optimizer.found_inf

    def _explain(self, step: int) -> str:
        """Repeats the bad step on all processes and says what came from where."""
        accelerator = self._accelerator
        rank, (order, what) = accelerator.process_index, (0, "")
        net = unwrap(self._model, accelerator)
        for x, labels in self._guard.held_batches():
            order, what = find_origin(self._loss, net, x, labels)
        if accelerator.num_processes > 1:
            # The first of all: the others may have got it from that process.
            found: list[tuple[int, int, str]] = [(order, rank, what)] * accelerator.num_processes
            torch.distributed.all_gather_object(found, (order, rank, what))
            order, rank, what = min(found)
        precision = accelerator.mixed_precision
        return (
            f"the loss or a gradient is not finite at step {step}, on rank {rank}: the first such "
            f"number is in {what}. Weights and optimizer are as before that step, as is the last "
            f"checkpoint. Ways out: a run with a lower learning rate (--lr, --fresh)"
            + ("" if precision == "no" else f", train without --mixed-precision {precision}")
        )


def _why_not(model: nn.Module, accelerator: Accelerator) -> str | None:
    """Returns why a step with this network cannot be captured, or None."""
    if accelerator.num_processes > 1:
        return "there are several processes"
    if accelerator.scaler is not None:
        return "the loss is scaled for float16"
    if accelerator.gradient_accumulation_steps > 1:
        return "gradients are accumulated"
    return why_not_capture(model)
