"""Shared memory that Triton's compiler takes for tiles of the INT8 product, on a machine without such a GPU.

python -m tests.kernels.compiled < [[compute capability, K, {tile}], ...]; prints the bytes of each. A process of its
own, as the interpreter of the other tests replaces the compiler.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama_engine.kernels import gemm, gemm_kernel


def shared_bytes(capability: int, k: int, tile: gemm.Tile) -> int:
    values = {
        "K": k,
        "INT8": True,
        "GROUP": 0,
        "SCALED": True,
        "EPILOGUE": gemm_kernel.STORE,
        "REUSED": False,
        "PDL": False,
    }
    values |= {"BM": tile.m, "BN": tile.n, "BK": tile.k, "SPLIT": tile.split, "SWAP": tile.swap}
    types = ["*i8", "*fp32", "*i8", "*fp32", "*fp16", None, None, "*i32", "*i32", "i32", "i32", "i32"]
    names = gemm_kernel.gemm_kernel.arg_names
    values |= {name: None for name, kind in zip(names, types) if kind is None}
    signature = {name: "constexpr" if name in values else kind for name, kind in zip(names, types)}
    signature |= {name: "constexpr" for name in names if name in values}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in values and name != "M"}
    source = ASTSource(fn=gemm_kernel.gemm_kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


if __name__ == "__main__":
    print(json.dumps([shared_bytes(capability, k, gemm.Tile(**tile)) for capability, k, tile in json.load(sys.stdin)]))
