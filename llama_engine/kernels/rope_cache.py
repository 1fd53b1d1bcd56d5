# ruff: noqa: ANN001, ANN201 (Triton kernels take untyped pointers)
"""The kernel before a prefill's attention: rotate the new queries and keys, and cache keys and values."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.kernels.quant import as_cached


@triton.jit
def rope_cache(
    qkv_ptr,
    kv_ptr,
    cos_ptr,
    sin_ptr,
    tables_ptr,
    slots_ptr,
    positions_ptr,
    max_blocks,
    v_offset,
    KVH: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    HEADS_P: tl.constexpr,
    TPB: tl.constexpr,
    PDL: tl.constexpr,
):
    HEAD: tl.constexpr = 2 * HALF
    HEADS: tl.constexpr = KVH * G
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots_ptr + row)
    pos = tl.load(positions_ptr + row)
    block = tl.load(tables_ptr + slot * max_blocks + pos // TPB).to(tl.int64)
    h = tl.arange(0, HEADS_P)
    d = tl.arange(0, HALF_P)
    cos = tl.load(cos_ptr + pos * HALF + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + pos * HALF + d, mask=d < HALF, other=0.0)[None, :]
    qkv = qkv_ptr + row.to(tl.int64) * ((HEADS + 2 * KVH) * HEAD)
    at = qkv + h[:, None] * HEAD + d[None, :]
    rotated = (h < HEADS + KVH)[:, None] & (d < HALF)[None, :]
    x1 = tl.load(at, mask=rotated, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=rotated, other=0.0).to(tl.float32)
    y1 = (x1 * cos - x2 * sin).to(tl.float16)
    y2 = (x2 * cos + x1 * sin).to(tl.float16)
    query = rotated & (h < HEADS)[:, None]
    tl.store(at, y1, mask=query)
    tl.store(at + HALF, y2, mask=query)
    kvh = h - HEADS
    new = kv_ptr + ((block * KVH + kvh[:, None]) * TPB + pos % TPB) * HEAD + d[None, :]
    key = rotated & (h >= HEADS)[:, None]
    tl.store(new, as_cached(y1, kv_ptr), mask=key)
    tl.store(new + HALF, as_cached(y2, kv_ptr), mask=key)
    v_at = at + KVH * HEAD
    tl.store(new + v_offset, as_cached(tl.load(v_at, mask=key, other=0.0), kv_ptr), mask=key)
    tl.store(new + v_offset + HALF, as_cached(tl.load(v_at + HALF, mask=key, other=0.0), kv_ptr), mask=key)
