"""Questions, how they are asked, and the answers to them."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.adapters import Adapter, CannotAskError, Plain

Observed = Mapping[str, Any]
Case = Callable[[Adapter, torch.device], Observed]

# Everything is computed in float64, where rounding stays far below this and mistakes far above.
TOLERANCE = 1e-6


class WrongError(Exception):
    """The result is not that of plain autograd.

    Args:
        detail: What differs.
        error: The relative error, where there is one.
    """

    def __init__(self, detail: str, error: float | None = None) -> None:
        super().__init__(detail, error)
        self.detail, self.error = detail, error


class RemoteError(Exception):
    """An error in another process; its text names the error's type."""


@dataclass(frozen=True)
class Question:
    """A question, and how it is asked.

    Attributes:
        name: The case's name.
        theme: Under what it stands in the table.
        text: What the table shows.
        case: Returns what is compared with the same case on plain autograd.
        may_raise: Whether a clear error is an answer that ours may give.
        refused: Whether plain autograd raises, and everybody may; the case compares by itself.
        alone: Whether the case compares by itself, and raises `WrongError`.
        gpus: How many it may use, where there are GPUs.
    """

    name: str
    theme: str
    text: str
    case: Case
    may_raise: bool = False
    refused: bool = False
    alone: bool = False
    gpus: int = 1


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        answer: `right`, `raises`, `WRONG`, `crash`, or `-` where it could not be asked.
        detail: The error's first line, what differed, the signal, or the reason.
        error: The relative error of a wrong result, where there is one.
    """

    answer: str
    detail: str = ""
    error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the answer as it is recorded."""
        return dataclasses.asdict(self)

    def passes(self, question: Question) -> bool:
        """Tells whether the answer is one that a scheme of ours may give."""
        return self.answer in {"right", "-"} or (self.answer == "raises" and question.may_raise)


QUESTIONS: dict[str, Question] = {}


def question(
    theme: str,
    *,
    may_raise: bool = False,
    refused: bool = False,
    alone: bool = False,
    gpus: int = 1,
) -> Callable[[Case], Case]:
    """Registers a case under a theme; its docstring is the question."""

    def register(case: Case) -> Case:
        name = case.__name__
        text = (case.__doc__ or "").strip()
        if name in QUESTIONS or not text:
            raise ValueError(f"case {name} needs a name of its own and a docstring")
        QUESTIONS[name] = Question(name, theme, text, case, may_raise, refused, alone, gpus)
        return case

    return register


def ask(query: Question, adapter: Adapter, device: torch.device) -> Answer:
    """Asks one question in this process.

    An error of the reference is a mistake of the case, and goes through.
    """
    expected: Observed | None = None
    refusal = ""
    try:
        if not query.alone:
            try:
                expected = _run(query, Plain(adapter.formula), device)
            except RuntimeError as error:
                if not query.refused:
                    raise
                refusal = first_line(error)
        if query.refused and not refusal:
            raise AssertionError(f"plain autograd does not refuse {query.name}")
        return _answer(query, adapter, device, expected)
    except CannotAskError as reason:
        return Answer("-", str(reason))


def _answer(
    query: Question, adapter: Adapter, device: torch.device, expected: Observed | None
) -> Answer:
    try:
        observed = _run(query, adapter, device)
        if device.type == "cuda":
            # What a library breaks on the device would be told of later, as if the case were.
            torch.cuda.synchronize()
    except CannotAskError:
        raise
    except WrongError as wrong:
        return Answer("WRONG", wrong.detail, wrong.error)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is its answer
        return Answer("right" if query.refused else "raises", first_line(error))
    try:
        if expected is not None:
            compare(observed, expected)
    except WrongError as wrong:
        return Answer("WRONG", wrong.detail, wrong.error)
    return Answer("right")


def _run(query: Question, adapter: Adapter, device: torch.device) -> Observed:
    random.seed(0)
    torch.manual_seed(0)
    return query.case(adapter, device)


def compare(observed: Observed, expected: Observed, tolerance: float = TOLERANCE) -> None:
    """Compares what was observed with what plain autograd gives.

    Raises:
        WrongError: If anything differs, with the largest relative error.
    """
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    scale = max((float(value.detach().norm()) for value in tensors.values()), default=0.0)
    wrong: dict[str, str] = {}
    worst = 0.0
    for name in [*expected, *(observed.keys() - expected.keys())]:
        got, value = observed.get(name), expected.get(name)
        if not isinstance(value, Tensor) and not isinstance(got, Tensor):
            if got != value:
                _, _, member = name.partition(": ")
                wrong[name] = f"{member} {got}, plain {value}".strip()
            continue
        error = relative_error(got, value, scale)
        if error <= tolerance:
            continue
        if value is None:
            wrong[name] = "plain autograd has none"
        else:
            wrong[name] = "missing" if got is None else ""
            worst = max(worst, error)
    if wrong:
        raise WrongError(f"differs: {_summary(wrong, [*expected])}", worst or None)


def _summary(wrong: Mapping[str, str], names: Sequence[str]) -> str:
    """Says what is wrong; of results with one text in front of a colon, how many."""
    kinds: dict[str, list[str]] = {}
    for name in wrong:
        kinds.setdefault(name.split(": ")[0], []).append(name)
    parts = []
    for kind, members in kinds.items():
        total = sum(name.split(": ")[0] == kind for name in names)
        notes = [f"{len(members)} of {total}"] if total > 1 else []
        notes += list(filter(None, (wrong[name] for name in members)))[:1]
        parts.append(f"{kind} ({'; '.join(notes)})" if notes else kind)
    return ", ".join(parts)


def relative_error(got: Tensor | None, expected: Tensor | None, scale: float = 0.0) -> float:
    """Returns the error of a tensor in relation to its norm.

    A missing gradient counts as zero. So does one far below `scale`, the largest norm of the
    comparison: the gradient of a bias in front of BatchNorm is zero but for rounding.
    """
    if got is None or expected is None:
        found = got if expected is None else expected
        return 0.0 if found is None else float(found.detach().norm() > 1e-8 * scale)
    if got.shape != expected.shape:
        return float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.detach().to(wide), expected.detach().to(wide)
    norm = max(float(expected.norm()), 1e-8 * scale)
    error = float((got - expected).norm())
    if not math.isfinite(error):
        return float("inf")
    return error / norm if norm else error


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its text, without addresses."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"0x[0-9a-f]+", "0x...", lines[0].strip())
    text = text if isinstance(error, RemoteError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 240 else f"{text[:237]}..."
