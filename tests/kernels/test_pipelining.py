"""What the compiler makes of the attention kernels for an H100: compiled here, so that no GPU is needed."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama_engine.kernels.attention import DECODE, PREFILL
from llama_engine.kernels.attention_{name} import {name} as kernel

if "{name}" == "decode":
    shape, sizes = DECODE, dict(GP=16, CHUNK=DECODE.chunk, MAXC=64, BT=DECODE.keys)
else:
    shape, sizes = PREFILL, dict(GP=4, BQ=PREFILL.rows // 4, BT=PREFILL.keys, PART=PREFILL.part)
    sizes |= dict(MAXP=PREFILL.max_parts, SPLIT=False, TMA=False)
constants = dict(KVH=8, G=4, HEAD=128, HEAD_P=128, TPB=64, PDL=True) | sizes
types = dict(qkv_ptr="*fp16", kv="*fp16", kv_ptr="*fp16", out_ptr="*fp16", cos_ptr="*fp32", sin_ptr="*fp32")
types |= dict(part_ptr="*fp32", stat_ptr="*fp32", scale="fp32", max_blocks="i32", v_offset="i32")
names = kernel.arg_names
source = ASTSource(
    fn=kernel,
    signature={{n: "constexpr" if n in constants else types.get(n, "*i32") for n in names}},
    constexprs={{(i,): constants[n] for i, n in enumerate(names) if n in constants}},
    attrs={{(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in ("v_offset", "kv") or "_ptr" in n}},
)
options = dict(num_warps=shape.warps, num_stages=shape.stages, launch_pdl=True)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"])
"""


@pytest.mark.parametrize(("name", "loops"), [("decode", 1), ("prefill", 2)])
def test_keys_and_values_are_on_their_way_a_step_ahead(name, loops, tmp_path):
    """A wait for all but n copies at the top of a loop leaves the next step's in flight; a wait for all (num = 0), as
    when an address hangs on a load of the same step, shows the memory's latency in every step."""
    pytest.importorskip("triton.backends.nvidia")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first_waits = [
        int(re.search(r"async_wait .*num = (\d+)", part).group(1))
        for part in done.stdout.split("scf.for")[1:]
        if "async_wait" in part.split("scf.yield")[0]
    ]
    assert len(first_waits) == loops
    assert all(waits >= 2 for waits in first_waits)  # one for the keys, one for the values
