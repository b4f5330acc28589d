"""The kernels compile for GPUs, down to machine code, on a machine without one: what the interpreter cannot say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from diagnostics.sensors.kernels import programs


def ptx(kernel, warps, constants, **types):
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


floats = dict.fromkeys("along down scales row_sums column_sums scales_a scales_b signs sums".split(), "*fp32")
limits = dict.fromkeys(("largest", "least_amax", "not_below"), "fp32")
tile = {"TILED": True, "WIDEN": False, "SUM": True, "M": 64, "N": 64, "TOGETHER": 8}
print(json.dumps({
    "hash": ptx(programs.hash_words, 4, {"BLOCK_WORDS": 4096, "TILE": 1024},
                words="*i32", table="*i64", total="*i64", start="i64", seed="i64"),
    "quantise": ptx(programs.quantise_and_sum, 4, {"HEIGHT": 16, "SHARED": False, "POWER_OF_TWO": True, "DOWN": True},
                    x="*bf16", codes="*fp8e4nv", **floats, **limits),
    "bf16": ptx(programs.multiply_and_sum, 4, {**tile, "SCALED": False, "K": 64},
                a="*bf16", b="*bf16", out="*bf16", **floats),
    "fp8": ptx(programs.multiply_and_sum, 4, {**tile, "SCALED": True, "K": 128},
               a="*fp8e4nv", b="*fp8e4nv", out="*bf16", **floats),
}))
"""


def test_they_compile_for_hopper_and_use_what_they_should(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    assert "add.u64" in made["hash"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in made["quantise"]
    assert ".f32.bf16.bf16" in made["bf16"]  # tensor cores, fp32 accumulators
    assert ".f32.e4m3.e4m3" in made["fp8"]
    assert "tf32" not in made["bf16"] + made["fp8"]  # the interpreter's widening is not compiled in
