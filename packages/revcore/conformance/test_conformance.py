"""All questions asked of ours, in one process; the command asks the other libraries too."""

from __future__ import annotations

import pytest
import torch

from conformance import report
from conformance.cases import QUESTIONS
from conformance.catalog import ADAPTERS
from conformance.questions import ask
from conformance.schemes import OURS


@pytest.mark.parametrize("case", QUESTIONS)
@pytest.mark.parametrize("adapter", [adapter.name for adapter in OURS])
def test_ours(adapter: str, case: str, request: pytest.FixtureRequest) -> None:
    """Ours answers as plain autograd does, or with a clear error where that is allowed."""
    device = torch.device(request.config.getoption("--device", default="cpu"))
    answer = ask(QUESTIONS[case], ADAPTERS[adapter], device)
    if answer.answer == "-":
        pytest.skip(answer.detail)
    assert answer.passes(QUESTIONS[case]), answer


def test_the_document_shows_the_records() -> None:
    """The tables are those of the records; `python packages/revcore/conformance --render`."""
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.fill(text) == text
