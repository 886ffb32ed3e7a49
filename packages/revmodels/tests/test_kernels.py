"""The kernels compile for a GPU, on any machine: the interpreter takes what a compiler does not."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.3", reason="older ones compile in another way")

COMPILE = """
import re
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import triton.language as tl
from revmodels import conv_kernels, conv_passes, kernels, passes

sizes = ["size", "width", "rows", "apart", "steps", "parts", "places"]
integers = dict.fromkeys([*sizes, "channels", "eights", "output_eights"], "i32")
floats = dict.fromkeys(["share", "momentum", "eps", "sign", "finer", "coarser", "limit"], "fp32")
tile = {"ROWS": passes.ROWS, "COLUMNS": passes.COLUMNS}
parts = {"PARTS": passes.PARTS, "CHANNELS": passes.CHANNELS}
VARIANTS = {
    "moments": tile | {"FOLD": 16},
    "merge_moments": parts | {"TRACK": True, "TILES": True},
    "normalize": tile | {"RELU": True},
    "gradient_sums": tile | {"RELU": True, "FOLD": 128},
    "merge_sums": parts,
    "input_gradient": tile | {"RELU": True},
}
product = {"DTYPE": tl.bfloat16, "PRECISION": "tf32"}
product |= {"ROWS": conv_passes.ROWS, "CHANNELS": 64, "OUTPUTS": 64}
around = product | {"KERNEL": 3, "HEIGHT": 8, "WIDTH": 8}
CONVOLUTIONS = {
    "convolve": around | {"ADD": True, "GRID": True, "TELL": True},
    "gradient_sums": product,
    "add_up": {"MORE": True, "PARTS": conv_passes.PARTS, "COLUMNS": conv_passes.COLUMNS},
    "input_gradient": product | {"ADD": True},
    "activation_gradient": around,
    "matrix_gradient": around,
}
for module, variants in (kernels, VARIANTS), (conv_kernels, CONVOLUTIONS):
    for name, constants in variants.items():
        kernel = getattr(module, name)
        types = integers | floats | dict.fromkeys(("x", "grad", "matrix"), "*bf16")
        types |= {"batches": "*i64"} | dict.fromkeys(constants, "constexpr")
        signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
        # What a launch sees of addresses; of the numbers of channels it sees nothing.
        places = enumerate(kernel.arg_names)
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in places if signature[a][0] == "*"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        binary = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
        assert binary.asm["cubin"]
        # One value of two bytes at a time would be slow beyond use.
        scalar = re.findall(r"ld[.]global[.]b16", binary.asm["ptx"])
        print(f"{module.__name__}.{name}", 0 if module is kernels else len(scalar))
"""


@pytest.mark.parametrize("capability", [90])
def test_all_kernels_compile(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert len(found) == 12
    # Any number of channels that eight divides is read as whole vectors.
    assert set(found.values()) == {"0"}
