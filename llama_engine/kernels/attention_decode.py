# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""Decode attention kernels: split over chunks of the context, then merged in order and quantized."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.kernels.quant import as_cached, store_row


@triton.jit
def _rotated(x_ptr, offs, cos_ptr, sin_ptr, pos, e, mask, HALF: tl.constexpr):
    """RoPE at ``pos`` of heads at ``x_ptr + offs``, whose dimensions are ``e``; fp16."""
    partner = tl.where(e < HALF, HALF, -HALF)
    cos = tl.load(cos_ptr + pos * HALF + e % HALF)
    sin = tl.load(sin_ptr + pos * HALF + e % HALF)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + offs + partner, mask=mask, other=0.0).to(tl.float32)
    return (x * cos + y * tl.where(e < HALF, -sin, sin)).to(tl.float16)


@triton.jit
def decode(
    qkv_ptr,
    kv_ptr,
    cos_ptr,
    sin_ptr,
    tables_ptr,
    slots_ptr,
    position_ptr,
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
    CHUNK: tl.constexpr,
    MAXC: tl.constexpr,
    BT: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD // 2
    HEADS: tl.constexpr = KVH * G
    row = tl.program_id(0)
    kvh = tl.program_id(1)
    g = tl.arange(0, GP)
    e = tl.arange(0, HEAD_P)
    t = tl.arange(0, BT)
    e_in = e < HEAD
    if PDL:
        gdc_launch_dependents()
    # The slots' state was written by earlier steps, so it is read before the wait (see _embed).
    slot = tl.load(slots_ptr + row)
    pos = tl.load(position_ptr + slot)
    table = tables_ptr + slot * max_blocks
    chunks = pos // CHUNK + 1
    newest = tl.load(table + pos // TPB).to(tl.int64)
    if tl.program_id(2) < chunks:
        if PDL:
            gdc_wait()
        qkv = qkv_ptr + row * ((HEADS + 2 * KVH) * HEAD)
        q_at = (kvh * G + g)[:, None] * HEAD + e[None, :]
        q_in = (g < G)[:, None] & e_in[None, :]
        q = _rotated(qkv, q_at, cos_ptr, sin_ptr, pos, e[None, :], q_in, HALF)
        for chunk in range(tl.program_id(2), chunks, tl.num_programs(2)):
            m = tl.full((GP,), float("-inf"), tl.float32)
            total = tl.zeros((GP,), tl.float32)
            acc = tl.zeros((GP, HEAD_P), tl.float32)
            if chunk == chunks - 1:
                # The newest position: rotated and cached here, and attended to from registers.
                k_new = _rotated(qkv, (HEADS + kvh) * HEAD + e, cos_ptr, sin_ptr, pos, e, e_in, HALF)
                v_new = tl.load(qkv + (HEADS + KVH + kvh) * HEAD + e, mask=e_in, other=0.0)
                new = kv_ptr + ((newest * KVH + kvh) * TPB + pos % TPB) * HEAD + e
                k_kept = as_cached(k_new, kv_ptr)
                v_kept = as_cached(v_new, kv_ptr)
                tl.store(new, k_kept, mask=e_in)
                tl.store(new + v_offset, v_kept, mask=e_in)
                m = tl.sum(q.to(tl.float32) * k_kept.to(tl.float32)[None, :], axis=1) * scale
                total = tl.full((GP,), 1.0, tl.float32)
                acc += v_kept.to(tl.float32)[None, :]
            # Each block's number is read a step ahead: loads that hang on loads of their own step are not pipelined.
            block = tl.load(table + chunk * CHUNK // TPB).to(tl.int64)
            for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, pos), BT):
                key_in = start + t < pos
                if TPB % BT == 0:
                    at = kv_ptr + ((block * KVH + kvh) * TPB + start % TPB) * HEAD + t * HEAD
                else:
                    blocks = tl.load(table + (start + t) // TPB, mask=key_in, other=0).to(tl.int64)
                    at = kv_ptr + ((blocks * KVH + kvh) * TPB + (start + t) % TPB) * HEAD
                tile_in = key_in[:, None] & e_in[None, :]
                k = tl.load(at[:, None] + e[None, :], mask=tile_in, other=0.0).to(tl.float16)
                v = tl.load(at[:, None] + v_offset + e[None, :], mask=tile_in, other=0.0).to(tl.float16)
                block = tl.load(table + tl.minimum(start + BT, pos) // TPB).to(tl.int64)
                s = tl.dot(q, tl.trans(k)) * scale
                s = tl.where(key_in[None, :], s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, axis=1))
                p = tl.exp2(s - m_new[:, None])
                shrink = tl.exp2(m - m_new)
                total = total * shrink + tl.sum(p, axis=1)
                acc = tl.dot(p.to(tl.float16), v, acc * shrink[:, None])
                m = m_new
            where = (row * MAXC + chunk) * HEADS + kvh * G + g
            tl.store(stat_ptr + where * 2, m, mask=g < G)
            tl.store(stat_ptr + where * 2 + 1, total, mask=g < G)
            tl.store(part_ptr + where[:, None] * HEAD + e[None, :], acc, mask=q_in)


@triton.jit
def merge(
    part_ptr,
    stat_ptr,
    slots_ptr,
    position_ptr,
    out_ptr,
    scale_ptr,
    plane,
    HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    CHUNK: tl.constexpr,
    MAXC: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    h = tl.arange(0, HEADS_P)
    e = tl.arange(0, HEAD_P)
    offs = h[:, None] * HEAD + e[None, :]
    mask = (h < HEADS)[:, None] & (e < HEAD)[None, :]
    if PDL:
        gdc_launch_dependents()
    chunks = tl.load(position_ptr + tl.load(slots_ptr + row)) // CHUNK + 1
    if PDL:
        gdc_wait()
    stat = stat_ptr + (row * MAXC * HEADS + h) * 2
    part = part_ptr + row.to(tl.int64) * (MAXC * HEADS * HEAD) + offs
    m = tl.full((HEADS_P,), float("-inf"), tl.float32)
    for first in range(0, chunks, 8):
        chunk = first + tl.arange(0, 8)
        there = (chunk < chunks)[:, None] & (h < HEADS)[None, :]
        m_c = tl.load(stat[None, :] + chunk[:, None] * (HEADS * 2), mask=there, other=float("-inf"))
        m = tl.maximum(m, tl.max(m_c, axis=0))
    m = tl.where(h < HEADS, m, 0.0)
    total = tl.zeros((HEADS_P,), tl.float32)
    acc = tl.zeros((HEADS_P, HEAD_P), tl.float32)
    for first in range(0, chunks, 2):
        for i in tl.static_range(2):  # two at a time, so that their loads overlap
            chunk = first + i
            there = (h < HEADS) & (chunk < chunks)
            weight = tl.exp2(tl.load(stat + chunk * (HEADS * 2), mask=there, other=float("-inf")) - m)
            total += weight * tl.load(stat + chunk * (HEADS * 2) + 1, mask=there, other=0.0)
            acc_c = tl.load(part + chunk * (HEADS * HEAD), mask=mask & (chunk < chunks), other=0.0)
            acc += weight[:, None] * acc_c
    out = tl.where(mask, acc / tl.where(h < HEADS, total, 1.0)[:, None], 0.0)
    store_row(out, out_ptr, scale_ptr, row, offs, mask, HEADS * HEAD, plane)
