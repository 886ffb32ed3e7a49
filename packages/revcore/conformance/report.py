"""Records of runs, and the tables that the documents make of them."""

from __future__ import annotations

import importlib.metadata
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from conformance.cases import QUESTIONS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCUMENT = HERE.parents[2] / "docs" / "conformance.md"
COUNTED = ("right", "raises", "WRONG", "crash", "-")


def write(file: Path, record: dict[str, Any]) -> None:
    """Writes a record, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    head = json.dumps({key: value for key, value in record.items() if key != "cases"}, indent=1)
    cases = ",\n  ".join(json.dumps(case) for case in record["cases"])  # one a line
    text = f'{head[:-2]},\n "cases": [\n  {cases}\n ]\n}}\n'
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def read(file: Path) -> dict[str, Any]:
    """Reads a record."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def version(package: str) -> str:
    """Returns an installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def render() -> None:
    """Writes the document's tables from the records."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def fill(text: str) -> str:
    """Replaces what stands between `<!-- record NAME -->` and `<!-- end -->`."""

    def replacement(match: re.Match[str]) -> str:
        record = read(RESULTS / f"{match[2]}.json")
        return f"{match[1]}\n{describe(record)}\n{match[3]}"

    pattern = r"(<!-- record (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, replacement, text, flags=re.DOTALL)


def describe(record: dict[str, Any]) -> str:
    """Returns a record as text: how it came about, the table, and the reasons."""
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    reasons: dict[str, int] = {}
    table = _table(record, reasons)
    listed = [f"{number}. {_escape(text)}" for text, number in reasons.items()]
    origin = f"Asked on {record['date']}, {record['hardware']['name']}, by `{record['command']}`"
    explained = "The numbers in brackets lead to what was seen:"
    return "\n".join([f"{origin}, with {versions}.", "", *table, "", explained, "", *listed])


def _table(record: dict[str, Any], reasons: dict[str, int]) -> list[str]:
    names = record["adapters"]
    answers = {(case["case"], case["adapter"]): case for case in record["cases"]}
    asked = [QUESTIONS[name] for name in dict.fromkeys(case["case"] for case in record["cases"])]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for theme, questions in groupby(asked, key=lambda question: question.theme):
        rows.append([f"**{theme}**", *([""] * len(names))])
        for question in questions:
            cells = (_cell(answers[question.name, name], reasons) for name in names)
            mark = " \\*" if question.may_raise else ""
            rows.append([f"{question.text.rstrip('.')}{mark}", *cells])
    rows.append(["**Counted**", *([""] * len(names))])
    for kind in COUNTED:
        counts = (sum(answers[q.name, name]["answer"] == kind for q in asked) for name in names)
        rows.append([kind, *map(str, counts)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(case: dict[str, Any], reasons: dict[str, int]) -> str:
    answer = str(case["answer"])
    if answer == "right":
        return answer
    number = reasons.setdefault(str(case["detail"]), len(reasons) + 1)
    error = case["error"]
    size = "" if error is None else f" {error:.2g}" if error < 100 else " >100"
    text = f"**{answer}{size}**" if answer in {"WRONG", "crash"} else answer
    return f"{text} ({number})"


def _escape(text: str) -> str:
    # An error's text is shown as it is: nothing in it is Markdown.
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)
