"""The kernels compile for a GPU, on any machine: the interpreter takes what a compiler does not."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.3", reason="older ones compile in another way")

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from revmodels import kernels, passes

integers = dict.fromkeys(["size", "width", "channels", "steps", "parts", "rows"], "i32")
floats = dict.fromkeys(["share", "momentum", "eps"], "fp32")
tile = {"ROWS": passes.ROWS, "COLUMNS": passes.COLUMNS}
parts = {"PARTS": passes.PARTS, "CHANNELS": passes.CHANNELS}
VARIANTS = {
    "moments": tile | {"FOLD": 16},
    "merge_moments": parts | {"TRACK": True},
    "normalize": tile | {"RELU": True},
    "gradient_sums": tile | {"RELU": True, "FOLD": 128},
    "merge_sums": parts,
    "input_gradient": tile | {"RELU": True},
}
for name, constants in VARIANTS.items():
    kernel = getattr(kernels, name)
    types = integers | floats | {"x": "*bf16", "batches": "*i64"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    binary = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert binary.asm["cubin"]
    print(name, len(binary.asm["ptx"]))
"""


@pytest.mark.parametrize("capability", [90])
def test_all_kernels_compile(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
