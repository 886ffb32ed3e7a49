"""A look inside: does each block undo what it does, and are the gradients those of storing?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revcore.arguments import Arguments, takes_gradient
from revcore.block import ReversibleBlock
from revcore.coupling import Coupling
from revcore.grid import to_grid
from revcore.reversible import set_reversing
from revcore.sequential import ReversibleSequential
from revcore.snapshot import duplicate
from revcore.streams import Streams, as_streams

Call = tuple[str, Streams, dict[str, Any]]


@dataclass(frozen=True)
class BlockCheck:
    """What was found for one call of one block.

    Attributes:
        name: Where the block is in the module that was checked.
        kind: Its class.
        inverse_error: Relative error of `inverse(forward(x))`; NaN if there is none, or if it would
            draw other random numbers.
        gradient_error: Relative error of the gradients when reversing, against those of stored
            activations; NaN if it was not asked.
        tolerance: The largest error that passes.
        problem: What is wrong, or None.
    """

    name: str
    kind: str
    inverse_error: float
    gradient_error: float
    tolerance: float
    problem: str | None


@dataclass(frozen=True, repr=False)
class InvertibilityReport:
    """What `check_invertible` found; printed, it is a table. True if nothing is wrong.

    Attributes:
        blocks: One entry for each call of a block, in the order in which the calls ended: a chain
            comes after its blocks.
    """

    blocks: tuple[BlockCheck, ...]

    @property
    def first_bad(self) -> BlockCheck | None:
        """The first block with a problem."""
        return next((block for block in self.blocks if block.problem), None)

    def __bool__(self) -> bool:
        return self.first_bad is None

    def __repr__(self) -> str:
        lines = []
        for block in self.blocks:
            errors = f"{block.inverse_error:9.1e}{block.gradient_error:10.1e}"
            verdict = f"BAD (> {block.tolerance:.1e})" if block.problem else "ok"
            lines.append(f"{errors}  {verdict:15}  {block.name} ({block.kind})")
        bad = self.first_bad
        end = f"first bad block: {bad.name}: {bad.problem}" if bad else "nothing is wrong"
        return "\n".join(["  inverse  gradient  verdict          block", *lines, end])


def check_invertible(
    module: nn.Module, *example: Tensor, tolerance: float | None = None, **kwargs: Any
) -> InvertibilityReport:
    """Runs a module and checks everything with an `inverse` in it on the input that it sees.

    A ReLU that reads exact zeros may get other gradients there when they are reconstructed as
    almost zeros; that counts as a difference too.

    Each such block is run twice, back, and with gradients, reversing and storing. One that draws
    random numbers, as dropout does, is inverted in evaluation mode; one that draws some there, too,
    is judged by its gradients alone. All this happens to copies, so that the module and torch's
    random states are left as they are.

    Args:
        module: A chain, a block, a coupling, any module with `forward` and `inverse`, or a network
            with such parts.
        example: Its input.
        tolerance: Largest relative error that passes; by default the square root of the precision
            of the block's input.
        kwargs: Keyword arguments of the module.

    Returns:
        A report for every call of a block. Print it; it is true if all is well.

    Raises:
        ValueError: If nothing with an `inverse` is called.

    Example:
        >>> chain = ReversibleSequential(*(ReversibleBlock(nn.Linear(4, 4)) for _ in range(2)))
        >>> report = check_invertible(chain.double(), torch.randn(3, 8, dtype=torch.float64))
        >>> bool(report), [block.name for block in report.blocks]
        (True, ['0', '1', 'ReversibleSequential'])
    """
    calls: list[Call] = []
    runner = duplicate(module)
    # A block stands for its coupling.
    inner = {block.coupling for block in runner.modules() if isinstance(block, ReversibleBlock)}
    for name, block in runner.named_modules():
        if block not in inner and callable(getattr(block, "inverse", None)):
            block.register_forward_hook(partial(_note, calls, name), with_kwargs=True)
    with torch.no_grad(), _fork([*example, *kwargs.values()]):
        runner(*example, **kwargs)
        if not calls:
            raise ValueError(f"{type(module).__name__} called nothing that has a method inverse")
        blocks = (_check(module, *call, tolerance) for call in calls)
        return InvertibilityReport(tuple(blocks))


def _note(calls: list[Call], name: str, _: Any, x: tuple[Any, ...], kwargs: Any, __: Any) -> None:
    # A copy, because the network may go on to change its tensors in place.
    copies = (each.clone() if isinstance(each, Tensor) else each for each in x)
    calls.append((name, tuple(copies), kwargs))


def _check(
    module: nn.Module, name: str, x: Streams, kwargs: Arguments, tolerance: float | None
) -> BlockCheck:
    block = duplicate(module.get_submodule(name))
    kind = type(block).__name__
    if not x or not all(map(takes_gradient, x)):
        given = ", ".join(str(getattr(each, "dtype", type(each).__name__)) for each in x)
        why = f"cannot be checked: called with {given or 'nothing'}, not with streams alone"
        return BlockCheck(name or kind, kind, math.nan, math.nan, math.nan, why)
    for part in block.modules():
        if isinstance(part, ReversibleSequential):
            part.log_det = False  # so that it returns what its inverse takes
    bits = [part.grid for part in block.modules() if isinstance(part, Coupling) and part.grid]
    if bits:
        x = tuple(to_grid(each, bits[0]) for each in x)  # which is what the inverse gives back
    limit = torch.finfo(x[0].dtype).eps ** 0.5 if tolerance is None else tolerance
    errors = {"inverse_error": math.nan, "gradient_error": math.nan}
    try:
        problem = _find_problem(block, x, kwargs, limit, errors)
    except Exception as error:  # noqa: BLE001 - of the user's code
        problem = f"{type(error).__name__}: {error}"
    return BlockCheck(name or kind, kind, **errors, tolerance=limit, problem=problem)


def _find_problem(
    block: Any, x: Streams, kwargs: Arguments, limit: float, errors: dict[str, float]
) -> str | None:
    one, two = duplicate(block), duplicate(block)
    with _fork(x):
        y, other = (as_streams(one(*x, **kwargs)) for _ in range(2))
    with _fork(x):
        change = relative_error(as_streams(two(*x, **kwargs)), y)
    if change > limit:
        return (
            f"not deterministic: two runs from one random state differ by {change:.1e}. torch's "
            "random numbers are replayed, those of Python, NumPy or other generators are not"
        )
    if relative_error(other, y) > limit:
        y, other = (as_streams(one.eval()(*x, **kwargs)) for _ in range(2))
    # An inverse would draw other numbers, where the backward pass draws the same.
    undone = math.nan
    if relative_error(other, y) <= limit:
        undone = relative_error(as_streams(one.inverse(*y, **kwargs)), x)
    errors["inverse_error"] = undone
    is_chain = isinstance(block, ReversibleSequential)
    # The inverse of a chain does not restart from kept inputs, the backward pass does.
    if undone > limit and not any(getattr(part, "keep_input", False) for part in block.children()):
        if not is_chain:
            return f"inverse does not undo forward: relative error {undone:.1e}"
        return (
            f"the errors of its blocks add up to {undone:.1e}. Use streams in a higher precision, "
            "keep_input=True on every k-th block, or the fixed-point coupling"
        )
    known = getattr(block, "coupling", block)  # memcnn wraps any module
    if is_chain or isinstance(known, Coupling) or len(x) == len(y) == 1:
        ours, plain = (_gradients(block, x, kwargs, reversing=way) for way in (True, False))
        errors["gradient_error"] = wrong = relative_error(ours, plain)
        if wrong > limit:
            return f"gradients are not those of stored activations: relative error {wrong:.1e}"
    return None


def _gradients(
    block: nn.Module, x: Streams, kwargs: Arguments, *, reversing: bool
) -> list[Tensor | None]:
    chain = ReversibleSequential(duplicate(block), split_dim=getattr(block, "split_dim", -1))
    set_reversing(chain, reversing)
    with torch.enable_grad(), _fork(x):
        leaves = [stream.detach().requires_grad_() for stream in x]
        y = as_streams(chain(*leaves, **kwargs))
        seeds = [torch.linspace(0.5, 1.5, t.numel()).view_as(t).to(t) for t in y]
        wanted = leaves + [p for p in chain.parameters() if p.requires_grad]
        return list(torch.autograd.grad(y, wanted, seeds, allow_unused=True))


def _fork(x: Sequence[Any]) -> AbstractContextManager[None]:
    device = next((each.device for each in x if isinstance(each, Tensor)), torch.device("cpu"))
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type)


def relative_error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Returns the largest relative error; a tensor that is almost zero counts by the largest."""
    pairs = [pair for pair in zip(found, expected, strict=True) if pair != (None, None)]
    norms = [_norm(b) for _, b in pairs if b is not None]
    worst = 0.0
    for a, b in pairs:
        if a is None or b is None or a.shape != b.shape:
            return math.inf
        worst = max(worst, _norm(a - b) / max(_norm(b), 1e-3 * max(norms), 1e-30), key=_or_infinity)
    return _or_infinity(worst)


def _or_infinity(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _norm(x: Tensor) -> float:
    # Half precision has no range for a sum of squares. What is not a number is no small number.
    norm: float = torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32))).item()
    return _or_infinity(norm)
