"""Which tile each matrix uses for how many rows: defaults."""

from __future__ import annotations

from llama_engine.kernels.gemm import Tile

ROW_BUCKETS = (16, 32, 64, 128)  # up to so many rows; the last one also stands for every larger number


def row_bucket(num_rows: int) -> int:
    """The tile bucket of a batch of ``num_rows``."""
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), ROW_BUCKETS[-1])


def default_tile(name: str, num_rows: int) -> Tile:
    """Good tiles on an H100 for a matrix called ``name`` (qkv, o, gate_up, down or lm_head)."""
    bucket = row_bucket(num_rows)
    if bucket == 128:
        return Tile(m=128, n=128, k=128, swap=False, warps=8, stages=3)
    return Tile(m=bucket, n=64, k=128, swap=True, warps=4, stages=4)
