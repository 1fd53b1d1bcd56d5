# ruff: noqa: ANN001, ANN202 (Triton kernels take untyped pointers)
"""Paged attention with grouped queries over fp16 KV: split-KV decode, and prefill tiles over cached and new tokens.

The context of a decode is cut into chunks of a fixed number of positions, whatever the batch, and the chunks' partial
softmaxes are merged in order; so a row's result does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.kernels.common import launch_options, next_power_of_2
from llama_engine.kernels.quant import store_digits

CHUNK, MAX_CHUNKS, DECODE_STAGES = 128, 128, 2
QUERY_ROWS, KEYS, PREFILL_WARPS, PREFILL_STAGES = 64, 64, 4, 2  # of a prefill tile; rows are tokens times heads


def chunk_size(max_seq_len: int) -> int:
    """Positions in one decode chunk: more of them where there would be very many chunks."""
    return max(CHUNK, next_power_of_2(-(-max_seq_len // MAX_CHUNKS)))


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
def _decode(
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
                tl.store(new, k_new, mask=e_in)
                tl.store(new + v_offset, v_new, mask=e_in)
                m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], axis=1) * scale
                total = tl.full((GP,), 1.0, tl.float32)
                acc += v_new.to(tl.float32)[None, :]
            for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, pos), BT):
                key_in = start + t < pos
                if TPB % BT == 0:
                    block = tl.load(table + start // TPB).to(tl.int64)
                    at = kv_ptr + ((block * KVH + kvh) * TPB + start % TPB) * HEAD + t * HEAD
                else:
                    blocks = tl.load(table + (start + t) // TPB, mask=key_in, other=0).to(tl.int64)
                    at = kv_ptr + ((blocks * KVH + kvh) * TPB + (start + t) % TPB) * HEAD
                tile_in = key_in[:, None] & e_in[None, :]
                k = tl.load(at[:, None] + e[None, :], mask=tile_in, other=0.0)
                v = tl.load(at[:, None] + v_offset + e[None, :], mask=tile_in, other=0.0)
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
def _merge(
    part_ptr,
    stat_ptr,
    slots_ptr,
    position_ptr,
    digits_ptr,
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
    store_digits(out, digits_ptr, scale_ptr, row, offs, mask, HEADS * HEAD, plane)


@triton.jit
def _rope_cache(
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
def _prefill(
    qkv_ptr,
    kv_ptr,
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
    PDL: tl.constexpr,
):
    HEADS: tl.constexpr = KVH * G
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts first
    kvh = tl.program_id(1)
    r = tl.arange(0, BQ * GP)
    e = tl.arange(0, HEAD_P)
    t = tl.arange(0, BT)
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
        for at in range(0, length, BT):
            key = at + t
            key_in = key < length
            if TPB % BT == 0:
                block = tl.load(tables_ptr + slot * max_blocks + at // TPB).to(tl.int64)
                where = kv_ptr + ((block * KVH + kvh) * TPB + at % TPB + t) * HEAD
            else:
                blocks = tl.load(tables_ptr + slot * max_blocks + key // TPB, mask=key_in, other=0).to(tl.int64)
                where = kv_ptr + ((blocks * KVH + kvh) * TPB + key % TPB) * HEAD
            kv_in = key_in[:, None] & (e < HEAD)[None, :]
            k = tl.load(where[:, None] + e[None, :], mask=kv_in, other=0.0)
            v = tl.load(where[:, None] + v_offset + e[None, :], mask=kv_in, other=0.0)
            s = tl.dot(q, tl.trans(k)) * scale
            s = tl.where(key[None, :] <= (start + token)[:, None], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            p = tl.exp2(s - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(tl.float16), v, acc * shrink[:, None])
            m = m_new
        tl.store(out_ptr + row * (HEADS * HEAD) + column, (acc / total[:, None]).to(tl.float16), mask=mask)


@dataclass
class PagedAttention:
    """The attention of one model and engine; holds what all layers share.

    ``cos`` and ``sin`` float32 ``[max_seq_len, head_size / 2]``; ``block_tables`` int32 ``[slots, max_blocks]``.
    """

    config: ModelConfig
    engine: EngineConfig
    block_tables: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    max_rows: int

    def __post_init__(self) -> None:
        c, device = self.config, self.block_tables.device
        self.chunk = chunk_size(self.engine.max_seq_len)
        self.max_chunks = -(-self.engine.max_seq_len // self.chunk)
        shape = (self.max_rows, self.max_chunks, c.num_heads)
        self.part = torch.empty((*shape, c.head_size), dtype=torch.float32, device=device)
        self.stat = torch.empty((*shape, 2), dtype=torch.float32, device=device)
        self.group = c.num_heads // c.num_kv_heads
        self.scale = math.log2(math.e) / math.sqrt(c.head_size)
        self.query_tokens = max(1, QUERY_ROWS // next_power_of_2(self.group))
        self.options = launch_options(device)

    def decode(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        slots: torch.Tensor,
        position: torch.Tensor,
        digits: torch.Tensor,
        a_scale: torch.Tensor,
        num_rows: int,
    ) -> None:
        """One new token a row: rotate, cache, attend; the result goes quantized to ``digits`` and ``a_scale``.

        ``qkv`` fp16 ``[*, qkv_size]``; ``kv`` as in :mod:`llama_engine.kernels`; ``position`` int32 a slot.
        """
        c = self.config
        # Enough programs to fill the chip; beyond that each walks several chunks.
        programs = min(self.max_chunks, -(-528 // (num_rows * c.num_kv_heads)))
        _decode[(num_rows, c.num_kv_heads, programs)](
            qkv,
            kv,
            self.cos,
            self.sin,
            self.block_tables,
            slots,
            position,
            self.part,
            self.stat,
            self.block_tables.shape[1],
            kv.stride(0),
            self.scale,
            KVH=c.num_kv_heads,
            G=self.group,
            GP=max(16, next_power_of_2(self.group)),
            HEAD=c.head_size,
            HEAD_P=max(16, next_power_of_2(c.head_size)),
            TPB=self.engine.tokens_per_block,
            CHUNK=self.chunk,
            MAXC=self.max_chunks,
            BT=KEYS,
            num_warps=4,
            num_stages=DECODE_STAGES,
            **self.options,
        )
        _merge[(num_rows,)](
            self.part,
            self.stat,
            slots,
            position,
            digits,
            a_scale,
            digits.stride(0),
            HEADS=c.num_heads,
            HEADS_P=next_power_of_2(c.num_heads),
            HEAD=c.head_size,
            HEAD_P=next_power_of_2(c.head_size),
            CHUNK=self.chunk,
            MAXC=self.max_chunks,
            num_warps=8,
            **self.options,
        )

    def tiles(self, first_row: int, start: int, length: int, slot: int) -> list[tuple[int, int, int, int]]:
        """The query tiles (first row, rows, slot, first position) of a chunk of prefill."""
        step = self.query_tokens
        return [(first_row + i, min(step, length - i), slot, start + i) for i in range(0, length, step)]

    def prefill(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        tiles: torch.Tensor,
        out: torch.Tensor,
        num_rows: int,
    ) -> None:
        """New tokens at ``positions`` of ``slots`` (int32 a row): rotate and cache them, then attend causally.

        ``tiles`` int32 ``[n, 4]`` from :meth:`tiles` (rows of zero do nothing); ``out`` fp16 ``[*, q_size]``; ``qkv``
        is rotated in place.
        """
        c = self.config
        half = c.head_size // 2
        _rope_cache[(num_rows,)](
            qkv,
            kv,
            self.cos,
            self.sin,
            self.block_tables,
            slots,
            positions,
            self.block_tables.shape[1],
            kv.stride(0),
            KVH=c.num_kv_heads,
            G=self.group,
            HALF=half,
            HALF_P=next_power_of_2(half),
            HEADS_P=next_power_of_2(c.num_heads + c.num_kv_heads),
            TPB=self.engine.tokens_per_block,
            num_warps=4,
            **self.options,
        )
        group = next_power_of_2(self.group)
        _prefill[(tiles.shape[0], c.num_kv_heads)](
            qkv,
            kv,
            out,
            self.block_tables,
            tiles,
            self.block_tables.shape[1],
            kv.stride(0),
            self.scale,
            KVH=c.num_kv_heads,
            G=self.group,
            GP=group,
            HEAD=c.head_size,
            HEAD_P=max(16, next_power_of_2(c.head_size)),
            TPB=self.engine.tokens_per_block,
            BQ=self.query_tokens,
            BT=KEYS,
            num_warps=PREFILL_WARPS,
            num_stages=PREFILL_STAGES,
            **self.options,
        )
