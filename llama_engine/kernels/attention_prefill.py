# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""Prefill attention kernels: rotate and cache the new tokens, then attend in tiles of queries."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
    tl.store(new, y1, mask=key)
    tl.store(new + HALF, y2, mask=key)
    v_at = at + KVH * HEAD
    tl.store(new + v_offset, tl.load(v_at, mask=key), mask=key)
    tl.store(new + v_offset + HALF, tl.load(v_at + HALF, mask=key), mask=key)


@triton.jit
def _attend(
    q,
    m,
    total,
    acc,
    kv,
    table,
    block,
    kvh,
    at,
    position,
    length,
    v_offset,
    scale,
    KVH: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    TPB: tl.constexpr,
    BT: tl.constexpr,
    MASK: tl.constexpr,
    TMA: tl.constexpr,
):
    """One step of the softmax: the keys ``at .. at + BT - 1``; with MASK those up to ``position`` of each row alone."""
    t = tl.arange(0, BT)
    e = tl.arange(0, HEAD_P)
    key = at + t
    if TMA:
        row = (block * KVH + kvh) * TPB + at % TPB
        k = kv.load([row, 0])
        v = kv.load([row + v_offset, 0])
    else:
        if TPB % BT == 0:
            where = kv + ((block.to(tl.int64) * KVH + kvh) * TPB + at % TPB + t) * HEAD
        elif MASK:
            blocks = tl.load(table + key // TPB, mask=key < length, other=0).to(tl.int64)
            where = kv + ((blocks * KVH + kvh) * TPB + key % TPB) * HEAD
        else:
            blocks = tl.load(table + key // TPB).to(tl.int64)
            where = kv + ((blocks * KVH + kvh) * TPB + key % TPB) * HEAD
        where = where[:, None] + e[None, :]
        if MASK:
            there = (key < length)[:, None] & (e < HEAD)[None, :]
            k = tl.load(where, mask=there, other=0.0)
            v = tl.load(where + v_offset, mask=there, other=0.0)
        elif HEAD == HEAD_P:
            k = tl.load(where)
            v = tl.load(where + v_offset)
        else:
            k = tl.load(where, mask=(e < HEAD)[None, :], other=0.0)
            v = tl.load(where + v_offset, mask=(e < HEAD)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k))
    if MASK:
        s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(tl.float16), v, acc * shrink[:, None])
    return m_new, total, acc


@triton.jit
def prefill(
    qkv_ptr,
    kv,
    out_ptr,
    tables_ptr,
    tiles_ptr,
    max_blocks,
    v_offset,
    scale,
    KVH: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    TPB: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """``kv`` points to the cache; with TMA it is a descriptor of its rows of HEAD, and ``v_offset`` counts rows."""
    HEADS: tl.constexpr = KVH * G
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts first
    kvh = tl.program_id(1)
    r = tl.arange(0, BQ * GP)
    e = tl.arange(0, HEAD_P)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.load(tiles_ptr + tile * 4)
    count = tl.load(tiles_ptr + tile * 4 + 1)
    slot = tl.load(tiles_ptr + tile * 4 + 2)
    start = tl.load(tiles_ptr + tile * 4 + 3)
    if count > 0:
        token = r // GP
        g = r % GP
        r_in = (token < count) & (g < G)
        column = (kvh * G + g)[:, None] * HEAD + e[None, :]
        mask = r_in[:, None] & (e < HEAD)[None, :]
        row = (first + token).to(tl.int64)[:, None]
        q = tl.load(qkv_ptr + row * ((HEADS + 2 * KVH) * HEAD) + column, mask=mask, other=0.0)
        m = tl.full((BQ * GP,), float("-inf"), tl.float32)
        total = tl.zeros((BQ * GP,), tl.float32)
        acc = tl.zeros((BQ * GP, HEAD_P), tl.float32)
        length = start + count
        position = start + token
        table = tables_ptr + slot * max_blocks
        # Every row sees the keys up to the first one's position; only the blocks after that need a mask.
        seen = (start + 1) // BT * BT
        # Each block's number is read a step ahead: loads that hang on loads of their own step are not pipelined.
        block = tl.load(table)
        for at in range(0, seen, BT):
            m, total, acc = _attend(
                q,
                m,
                total,
                acc,
                kv,
                table,
                block,
                kvh,
                at,
                position,
                length,
                v_offset,
                scale,
                KVH,
                HEAD,
                HEAD_P,
                TPB,
                BT,
                False,
                TMA,
            )
            block = tl.load(table + tl.minimum(at + BT, length - 1) // TPB)
        for at in range(seen, length, BT):
            m, total, acc = _attend(
                q,
                m,
                total,
                acc,
                kv,
                table,
                block,
                kvh,
                at,
                position,
                length,
                v_offset,
                scale,
                KVH,
                HEAD,
                HEAD_P,
                TPB,
                BT,
                True,
                TMA,
            )
            block = tl.load(table + tl.minimum(at + BT, length - 1) // TPB)
        tl.store(out_ptr + row * (HEADS * HEAD) + column, (acc / total[:, None]).to(tl.float16), mask=mask)
