"""How far reconstructed activations are from the true ones, while a network is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from revcore import ReversibleSequential, track_drift
from revtrain.step import TrainStep


class DriftError(RuntimeError):
    """Activations were reconstructed worse than allowed, so gradients are no longer right.

    Attributes:
        step: The step at which that was seen, counted from 1.
        name: The branch before which the reconstruction is off.
        error: Norm of the difference over the norm of the true stream.
    """

    def __init__(self, message: str, step: int, name: str, error: float) -> None:
        super().__init__(message)
        self.step = step
        self.name = name
        self.error = error


class DriftWatch:
    """Compares reconstructed with true activations once in so many steps.

    Args:
        net: The network, without its wrapper; branches are named as it names them.
        train_step: What takes the steps.
        accelerator: Gathers the errors of all processes.
        every: Steps between two measurements; None for no measurement.
        bound: The largest error that is allowed; None for any that is finite.

    Attributes:
        worst: The largest error since this was last set to None; the same on all processes.

    Raises:
        ValueError: There is something to measure, but no chain that reverses.
    """

    def __init__(
        self,
        net: nn.Module,
        train_step: TrainStep,
        accelerator: Accelerator,
        *,
        every: int | None,
        bound: float | None,
    ) -> None:
        self._net = net
        self._train_step = train_step
        self._accelerator = accelerator
        self._every = every
        # No error that is infinite or NaN is within this one.
        self._bound = sys.float_info.max if bound is None else bound
        self.worst: float | None = None
        chains = [part for part in net.modules() if isinstance(part, ReversibleSequential)]
        if every and not any(chain.reversing and len(chain) for chain in chains):
            raise ValueError(
                f"drift_every (={every}) compares reconstructed activations with the true ones, "
                "but this network stores all of them: leave it out, or train a reversible "
                "network, without --stored"
            )

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Creates a context for one step; measures in it if it is the turn of that step.

        All processes call it together. A step that is measured is an ordinary one, but keeps its
        activations, and is waited for.

        Args:
            step: Number of the step, counted from 1.

        Raises:
            DriftError: The error is larger than allowed; on all processes.
            NonFiniteLossError: A step was bad: what is not finite has no drift.
        """
        if not self._every or step % self._every:
            yield
            return
        with track_drift() as drift:
            yield
        self._train_step.check()
        if self._train_step.skipped:  # with float16: its overflow says nothing of drift
            return
        here = drift.worst(self._net)
        rank = self._accelerator.process_index
        found = gather_object([(here.error, here.name, rank)])
        error, name, rank = max(found, key=lambda one: (one[0] != one[0], one[0]))
        if not error <= self._bound:  # NaN is not
            raise DriftError(self._explain(step, name, error, rank), step, name, error)
        self.worst = max(error, self.worst or 0.0)

    def _explain(self, step: int, name: str, error: float, rank: int) -> str:
        return (
            f"reconstructed activations drift: at step {step}, on rank {rank}, the streams before "
            f"branch {name!r} are off by {error:.2g} of their norm, more than drift_bound "
            f"(={self._bound:.2g}). The last checkpoint is of an earlier step. Ways out: streams "
            "in float32 (inputs of reversible chains are not cast to half precision), "
            "keep_input=True on every k-th block (a kept input restarts the chain exactly), "
            "revcore.FixedPointCoupling (reverses bit for bit), --stored (all of these in a new "
            "run, --fresh), or a larger --drift-bound with --resume"
        )
