"""The Python blocks of every document run, from top to bottom, and none is passed over."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "packages/*/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
# Any spelling that a reader would see as Python. Sybil runs the plain one, "```python", alone. A
# file of examples/, included as a whole, is run by test_examples.py.
FENCE = re.compile(
    r"(?im)^\s*(?:`{3,}|~{3,})[ {.]*(?:py\b|py3\b|python|pycon)(?! title=\"examples/\w+\.py\" }$)"
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # The tensors are so small that threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def examples(path):
    return list(Sybil([PythonCodeBlockParser()]).parse(ROOT / path).examples())


@pytest.mark.parametrize("path", DOCUMENTS)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    blocks = examples(path)
    assert len(blocks) == len(FENCE.findall((ROOT / path).read_text(encoding="utf-8")))
    monkeypatch.chdir(tmp_path)
    # The page shows MemCNN's users that their code runs with ours in its place.
    if path == "docs/migration.md":
        monkeypatch.setitem(sys.modules, "memcnn", importlib.import_module("revcore.memcnn"))
    for block in blocks:
        block.evaluate()


def test_tables_are_those_of_the_records():
    report = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    done = subprocess.run(report, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_documents_hold_python():
    counts = {path: len(examples(path)) for path in DOCUMENTS}
    assert all(counts[f"{package}README.md"] for package in ("", "packages/revcore/"))
