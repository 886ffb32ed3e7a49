"""Importing revcore is cheap beside importing torch."""

import subprocess
import sys

# Not a time, which depends on the machine: torch._dynamo alone would take seconds.
SCRIPT = """
import sys, torch
before = set(sys.modules)
import revcore
print(*(name for name in set(sys.modules) - before if name.split(".")[0] != "revcore"))
"""


def test_nothing_but_revcore_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
