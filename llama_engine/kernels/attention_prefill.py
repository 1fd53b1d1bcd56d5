# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""Prefill attention kernels: tiles of queries walk their context, some of them with several programs."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
    k = k.to(tl.float16)  # from e4m3 exactly
    v = v.to(tl.float16)
    s = tl.dot(q, tl.trans(k))
    if MASK:
        s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
    base = m_new
    if MASK:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a part that begins after a row's position
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(m - base)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(tl.float16), v, acc * shrink[:, None])
    return m_new, total, acc


@triton.jit
def _merge(m, total, acc, m_part, total_part, acc_part):
    """The softmax over what both cover; the second comes later in the context."""
    m_new = tl.maximum(m, m_part)
    old = tl.exp2(m - m_new)
    new = tl.exp2(m_part - m_new)
    return m_new, total * old + total_part * new, acc * old[:, None] + acc_part * new[:, None]


@triton.jit
def prefill(
    qkv_ptr,
    kv,
    out_ptr,
    tables_ptr,
    tiles_ptr,
    part_ptr,
    stat_ptr,
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
    PART: tl.constexpr,
    MAXP: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """``kv`` points to the cache; with TMA it is a descriptor of its rows of HEAD, and ``v_offset`` counts rows.

    The context is walked in parts of PART keys, each with a softmax of its own, merged in order: here, or with SPLIT
    by :func:`merge`, so that both give the same bits.
    """
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
    length = start + count
    parts = tl.cdiv(length, PART)
    if (count > 0) & (tl.program_id(2) < parts):
        token = r // GP
        g = r % GP
        r_in = (token < count) & (g < G)
        column = (kvh * G + g)[:, None] * HEAD + e[None, :]
        mask = r_in[:, None] & (e < HEAD)[None, :]
        row = (first + token).to(tl.int64)[:, None]
        out_at = out_ptr + row * (HEADS * HEAD) + column
        q = tl.load(qkv_ptr + row * ((HEADS + 2 * KVH) * HEAD) + column, mask=mask, other=0.0)
        position = start + token
        table = tables_ptr + slot * max_blocks
        # Every row sees the keys up to the first one's position; only the blocks after that need a mask.
        seen = (start + 1) // BT * BT
        m_all = tl.full((BQ * GP,), float("-inf"), tl.float32)
        total_all = tl.zeros((BQ * GP,), tl.float32)
        acc_all = tl.zeros((BQ * GP, HEAD_P), tl.float32)
        for part in range(tl.program_id(2), parts, tl.num_programs(2)):
            m = tl.full((BQ * GP,), float("-inf"), tl.float32)
            total = tl.zeros((BQ * GP,), tl.float32)
            acc = tl.zeros((BQ * GP, HEAD_P), tl.float32)
            begin = part * PART
            end = tl.minimum(begin + PART, length)
            # Each block's number is read a step ahead: loads that hang on loads of their own step are not pipelined.
            block = tl.load(table + begin // TPB)
            for at in range(begin, tl.minimum(seen, end), BT):
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
            for at in range(tl.maximum(seen, begin), end, BT):
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
            if not SPLIT:
                m_all, total_all, acc_all = _merge(m_all, total_all, acc_all, m, total, acc)
            elif parts == 1:
                tl.store(out_at, (acc / total[:, None]).to(tl.float16), mask=mask)
            else:
                where = ((tile * MAXP + part) * KVH + kvh) * (BQ * GP) + r
                tl.store(stat_ptr + where * 2, m)
                tl.store(stat_ptr + where * 2 + 1, total)
                tl.store(part_ptr + where.to(tl.int64)[:, None] * HEAD_P + e[None, :], acc)
        if not SPLIT:
            tl.store(out_at, (acc_all / total_all[:, None]).to(tl.float16), mask=mask)


@triton.jit
def merge(
    out_ptr,
    tiles_ptr,
    part_ptr,
    stat_ptr,
    KVH: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    BQ: tl.constexpr,
    PART: tl.constexpr,
    MAXP: tl.constexpr,
    PDL: tl.constexpr,
):
    """What :func:`prefill` leaves of the tiles whose context has several parts."""
    HEADS: tl.constexpr = KVH * G
    tile = tl.program_id(0)
    kvh = tl.program_id(1)
    r = tl.arange(0, BQ * GP)
    e = tl.arange(0, HEAD_P)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.load(tiles_ptr + tile * 4)
    count = tl.load(tiles_ptr + tile * 4 + 1)
    parts = tl.cdiv(tl.load(tiles_ptr + tile * 4 + 3) + count, PART)
    if (count > 0) & (parts > 1):
        m = tl.full((BQ * GP,), float("-inf"), tl.float32)
        total = tl.zeros((BQ * GP,), tl.float32)
        acc = tl.zeros((BQ * GP, HEAD_P), tl.float32)
        for part in range(parts):
            where = ((tile * MAXP + part) * KVH + kvh) * (BQ * GP) + r
            m_part = tl.load(stat_ptr + where * 2)
            total_part = tl.load(stat_ptr + where * 2 + 1)
            acc_part = tl.load(part_ptr + where.to(tl.int64)[:, None] * HEAD_P + e[None, :])
            m, total, acc = _merge(m, total, acc, m_part, total_part, acc_part)
        token = r // GP
        g = r % GP
        column = (kvh * G + g)[:, None] * HEAD + e[None, :]
        mask = ((token < count) & (g < G))[:, None] & (e < HEAD)[None, :]
        row = (first + token).to(tl.int64)[:, None]
        tl.store(out_ptr + row * (HEADS * HEAD) + column, (acc / total[:, None]).to(tl.float16), mask=mask)
