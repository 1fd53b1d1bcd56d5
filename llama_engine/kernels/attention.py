"""Paged attention with grouped queries over fp16 or e4m3 KV: split-KV decode, prefill tiles over old and new tokens.

The context of a decode is cut into chunks of a fixed number of positions, whatever the batch, and the chunks' partial
softmaxes are merged in order; so a row's result does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.kernels import attention_decode, attention_prefill
from llama_engine.kernels.common import launch_options, multiprocessors
from llama_engine.kernels.rope_cache import rope_cache
from llama_engine.model.rope import rope_tables

MERGE_WARPS = 16


@dataclass(frozen=True)
class DecodeShape:
    """How a decode's context is cut. ``chunk``, ``keys`` and ``warps`` decide the order of sums, so they hold for every
    batch; ``stages`` and ``programs`` (a multiprocessor, in all) may be anything."""

    chunk: int = 256  # positions; more of them where a sequence could have more than max_chunks
    max_chunks: int = 128
    keys: int = 32
    warps: int = 2
    stages: int = 3
    programs: int = 8  # beyond that each walks several chunks

    def chunk_size(self, max_seq_len: int) -> int:
        return max(self.chunk, triton.next_power_of_2(-(-max_seq_len // self.max_chunks)))


@dataclass(frozen=True)
class PrefillShape:
    """A tile of queries and how its keys are walked. Only ``keys`` and ``part`` decide the order of a row's sums."""

    rows: int = 64  # tokens times the query heads of a KV head
    keys: int = 64
    warps: int = 4
    stages: int = 3
    part: int = 2048  # keys with a softmax of their own; more of them where a sequence could have more than max_parts
    max_parts: int = 16
    programs: int = 2  # a multiprocessor: a prefill of fewer spreads the parts of its contexts over several
    split_tiles: int = 32  # more tiles at once than these never spread
    tma: bool = True  # keys and values through the tensor memory accelerator, where GPU and cache's blocks allow it


DECODE, PREFILL = DecodeShape(), PrefillShape()


@dataclass
class PagedAttention:
    """The attention of one model and engine, up to a row a slot; ``block_tables`` int32 ``[slots, max_blocks]``."""

    config: ModelConfig
    engine_config: EngineConfig
    block_tables: torch.Tensor
    decode_shape: DecodeShape = DECODE
    prefill_shape: PrefillShape = PREFILL

    def __post_init__(self) -> None:
        c, device = self.config, self.block_tables.device
        self.chunk = self.decode_shape.chunk_size(self.engine_config.max_seq_len)
        self.max_chunks = -(-self.engine_config.max_seq_len // self.chunk)
        self.cos, self.sin = (table.to(device) for table in rope_tables(c, self.engine_config.max_seq_len))
        shape = (len(self.block_tables), self.max_chunks, c.num_heads)
        self.part = torch.empty((*shape, c.head_size), dtype=torch.float32, device=device)
        self.stat = torch.empty((*shape, 2), dtype=torch.float32, device=device)
        most = self.engine_config.max_seq_len
        prefill = self.prefill_shape
        self.part_size = max(prefill.part, triton.next_power_of_2(-(-most // prefill.max_parts)))
        self.max_parts = -(-most // self.part_size)
        self.group = c.num_heads // c.num_kv_heads
        self.scale = math.log2(math.e) / math.sqrt(c.head_size)
        self.query_tokens = max(1, self.prefill_shape.rows // triton.next_power_of_2(self.group))
        self.options = launch_options(device)
        rows = self.query_tokens * triton.next_power_of_2(self.group)
        head = max(16, triton.next_power_of_2(c.head_size))
        lines = prefill.split_tiles * self.max_parts * c.num_kv_heads * rows if self.max_parts > 1 else 0
        self.prefill_part = torch.empty((lines, head), dtype=torch.float32, device=device)
        self.prefill_stat = torch.empty((lines, 2), dtype=torch.float32, device=device)
        self.programs = self.decode_shape.programs * multiprocessors(device)
        self.most_prefills = prefill.programs * multiprocessors(device)
        # the accelerator came with Hopper; in Triton's interpreter descriptors work too
        self.accelerates = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9

    def decode(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        slots: torch.Tensor,
        position: torch.Tensor,
        out: torch.Tensor,
        a_scale: torch.Tensor | None,
        num_rows: int,
    ) -> None:
        """One new token a row: rotate, cache, attend; the result goes to ``out``, in the form that its dtype asks for
        (:func:`llama_engine.kernels.quant.quantize_rows`), and its row scales to ``a_scale``.

        ``qkv`` fp16 ``[*, qkv_size]``; ``kv`` as in :mod:`llama_engine.kernels`; ``position`` int32 a slot.
        """
        c, shape = self.config, self.decode_shape
        programs = min(self.max_chunks, -(-self.programs // (num_rows * c.num_kv_heads)))
        attention_decode.decode[(num_rows, c.num_kv_heads, programs)](
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
            GP=max(16, triton.next_power_of_2(self.group)),
            HEAD=c.head_size,
            HEAD_P=max(16, triton.next_power_of_2(c.head_size)),
            TPB=self.engine_config.tokens_per_block,
            CHUNK=self.chunk,
            MAXC=self.max_chunks,
            BT=shape.keys,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **self.options,
        )
        attention_decode.merge[(num_rows,)](
            self.part,
            self.stat,
            slots,
            position,
            out,
            a_scale,
            out.stride(0),
            HEADS=c.num_heads,
            HEADS_P=triton.next_power_of_2(c.num_heads),
            HEAD=c.head_size,
            HEAD_P=triton.next_power_of_2(c.head_size),
            CHUNK=self.chunk,
            MAXC=self.max_chunks,
            num_warps=MERGE_WARPS,
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
        rope_cache[(num_rows,)](
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
            HALF_P=triton.next_power_of_2(half),
            HEADS_P=triton.next_power_of_2(c.num_heads + c.num_kv_heads),
            TPB=self.engine_config.tokens_per_block,
            num_warps=4,
            **self.options,
        )
        group, shape, head = triton.next_power_of_2(self.group), self.prefill_shape, c.head_size
        tma = (
            shape.tma
            and self.accelerates
            and self.engine_config.tokens_per_block % shape.keys == 0
            and head == max(16, triton.next_power_of_2(head))
        )
        cache, v_offset = kv, kv.stride(0)
        if tma:
            cache = TensorDescriptor.from_tensor(kv.view(-1, head), [shape.keys, head])
            v_offset //= head
        num_tiles, full = tiles.shape[0], -(-num_rows // self.query_tokens)  # those that are not padding
        split = min(self.max_parts, -(-self.most_prefills // (full * c.num_kv_heads)))
        if num_tiles > shape.split_tiles:
            split = 1
        partial = (self.prefill_part, self.prefill_stat)
        sizes = {"KVH": c.num_kv_heads, "G": self.group, "GP": group, "HEAD": c.head_size}
        sizes |= {"HEAD_P": max(16, triton.next_power_of_2(c.head_size)), "BQ": self.query_tokens}
        sizes |= {"PART": self.part_size, "MAXP": self.max_parts}
        attention_prefill.prefill[(num_tiles, c.num_kv_heads, split)](
            qkv,
            cache,
            out,
            self.block_tables,
            tiles,
            *partial,
            self.block_tables.shape[1],
            v_offset,
            self.scale,
            TPB=self.engine_config.tokens_per_block,
            BT=shape.keys,
            SPLIT=split > 1,
            TMA=tma,
            **sizes,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **self.options,
        )
        if split > 1:
            grid = (num_tiles, c.num_kv_heads)
            attention_prefill.merge[grid](out, tiles, *partial, **sizes, num_warps=shape.warps, **self.options)
