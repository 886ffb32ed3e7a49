"""What importing revcore costs beside importing torch."""

import subprocess
import sys


def test_the_import_and_an_eager_step_leave_dynamo_alone():
    """It takes seconds to import."""
    code = """
import sys, torch
before = "torch._dynamo" in sys.modules
import revcore
block = revcore.ReversibleBlock(torch.nn.Linear(2, 2))
block(torch.randn(3, 4)).sum().backward()
print(before, "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False", "False"]


def test_nothing_but_revcore_is_imported():
    code = """
import sys, torch
before = set(sys.modules)
import revcore
print(*(name for name in set(sys.modules) - before if name.split(".")[0] != "revcore"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
