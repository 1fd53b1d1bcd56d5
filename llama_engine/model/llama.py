"""The Llama forward pass in PyTorch operations: the reference of every kernel, and the path where none is built.

Hugging Face's Llama conventions: RMSNorm in float32, rotate_half RoPE, SwiGLU. The paged KV cache is read through
block tables exactly as the kernels read it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.model.rope import rope_tables
from llama_engine.model.schemes import E4M3_MAX, FP8, INT8, KV_DTYPES, quantize_e4m3
from llama_engine.model.weights import EngineWeights, Linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[T, heads, head_size]`` by ``cos``/``sin`` ``[T, head_size / 2]``."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class TorchModel:
    """The reference: any device, ``dtype`` activations (float32 unless asked otherwise).

    ``kv`` is one tensor a layer, fp16 or e4m3 as ``engine.kv_cache`` says, ``[2, engine.num_kv_blocks, kv_heads,
    tokens_per_block, head_size]``.
    """

    name = "torch"

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        weights: EngineWeights,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.device = weights.embedding.device
        self.tokens_per_block = engine.tokens_per_block
        self.cos, self.sin = (table.to(self.device) for table in rope_tables(config, engine.max_seq_len))
        shape = (2, engine.num_kv_blocks, config.num_kv_heads, engine.tokens_per_block, config.head_size)
        self.kv = [
            torch.zeros(shape, dtype=KV_DTYPES[engine.kv_cache]).to(self.device) for _ in range(config.num_layers)
        ]

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """``x @ W.T`` for ``x`` ``[T, K]``; INT8 through PyTorch's own weight-only kernel on a CPU.

        FP8 is emulated: the products of e4m3 values are summed in float32.
        """
        if linear.scheme is FP8:
            values, scale = quantize_e4m3(x)
            return (F.linear(values.float(), linear.weight.float()) * scale[:, None] * linear.scale).to(x.dtype)
        if linear.scheme is INT8 and self.device.type == "cpu" and x.shape[0] <= 64:
            return torch._weight_int8pack_mm(x, linear.weight, linear.scale.to(x.dtype))
        return F.linear(x, linear.dequantize(x.dtype))

    @torch.inference_mode()
    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, rows: Tensor) -> Tensor:
        """One pass over a ragged batch whose tokens of one slot are contiguous, in position order.

        int32 ``[T]`` ids, positions and slots, int32 ``[slots, blocks]`` tables, int32 ``[L]`` rows whose logits are
        wanted -> float32 ``[L, vocab]``.
        """
        return self._forward([self], ids, positions, slots, block_tables, rows)

    def _forward(
        self, ranks: Sequence[TorchModel], ids: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, rows: Tensor
    ) -> Tensor:
        """:meth:`forward` of a model whose ``ranks`` (this is the first) each hold a part of every matrix."""
        x = self.weights.embedding[ids.long()].to(self.dtype)
        spans = self._spans(positions, slots)
        batches = [[t.to(rank.device) for t in (positions, slots, tables)] for rank in ranks]

        def total(part: Callable[[TorchModel, Tensor, list[Tensor]], Tensor]) -> Tensor:  # in rank order
            parts = [part(rank, x.to(rank.device), batch).to(self.device) for rank, batch in zip(ranks, batches)]
            return functools.reduce(Tensor.add, parts)

        for i in range(self.config.num_layers):
            x = x + total(lambda rank, x, batch, i=i: rank._attention(i, x, *batch, spans))
            x = x + total(lambda rank, x, _, i=i: rank._mlp(i, x))
        x = rms_norm(x[rows.long()], self.weights.final_norm, self.config.rms_norm_eps)
        heads = [rank.linear(x.to(rank.device), rank.weights.lm_head).to(self.device) for rank in ranks]
        return torch.cat(heads, dim=-1).float()

    def _attention(
        self, i: int, x: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, spans: list[tuple[int, ...]]
    ) -> Tensor:
        """What the attention of layer ``i`` adds to ``x``, from the heads that are here."""
        c, layer, kv = self.config, self.weights.layers[i], self.kv[i]
        cos, sin = self.cos[positions.long()], self.sin[positions.long()]
        where = tables[slots.long(), (positions // self.tokens_per_block).long()].long()
        offset = (positions % self.tokens_per_block).long()
        qkv = self.linear(rms_norm(x, layer.input_norm, c.rms_norm_eps), layer.qkv)
        q, k, v = (
            part.unflatten(-1, (-1, c.head_size)) for part in qkv.split((c.q_size, c.kv_size, c.kv_size), dim=-1)
        )
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if kv.dtype == KV_DTYPES["fp8"]:  # PyTorch makes NaN of what is too large, the kernels the largest value
            k, v = k.clamp(-E4M3_MAX, E4M3_MAX), v.clamp(-E4M3_MAX, E4M3_MAX)
        kv[0, where, :, offset] = k.to(kv.dtype)
        kv[1, where, :, offset] = v.to(kv.dtype)
        attended = torch.cat([self._attend(q[a:b], kv, tables[slot], start) for a, b, slot, start in spans])
        return self.linear(attended, layer.o)

    def _mlp(self, i: int, x: Tensor) -> Tensor:
        """What the MLP of layer ``i`` adds to ``x``, from the rows that are here."""
        layer = self.weights.layers[i]
        normed = rms_norm(x, layer.post_norm, self.config.rms_norm_eps)
        gate, up = self.linear(normed, layer.gate_up).chunk(2, dim=-1)
        return self.linear(F.silu(gate) * up, layer.down)

    @staticmethod
    def _spans(positions: Tensor, slots: Tensor) -> list[tuple[int, int, int, int]]:
        """(first row, last row + 1, slot, first position) of each sequence in the batch."""
        slot_of, position_of = slots.tolist(), positions.tolist()
        edges = [0] + [i for i in range(1, len(slot_of)) if slot_of[i] != slot_of[i - 1]] + [len(slot_of)]
        return [(a, b, slot_of[a], position_of[a]) for a, b in itertools.pairwise(edges)]

    def _attend(self, q: Tensor, kv: Tensor, table: Tensor, start: int) -> Tensor:
        """``q`` ``[n, heads, head_size]`` at positions ``start ..`` over the cached context -> ``[n, q_size]``."""
        n, length = len(q), start + len(q)
        blocks = table[: -(-length // self.tokens_per_block)].long()
        k, v = kv[:, blocks].to(self.dtype).transpose(2, 3).flatten(1, 2)[:, :length]
        mask = None
        if n > 1:
            span = torch.arange(length, device=self.device)
            mask = span[None, :] <= span[start:, None]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


class SplitModel:
    """Tensor-parallel ranks as one model, with the face of a :class:`TorchModel`: each holds its heads, its part of the
    MLP and its rows of lm_head; what they add to the residual is summed in rank order on the first one's device."""

    name = "torch"

    def __init__(self, ranks: Sequence[TorchModel]) -> None:
        self.ranks, self.device = ranks, ranks[0].device

    @torch.inference_mode()
    def forward(self, *batch: Tensor) -> Tensor:
        """As :meth:`TorchModel.forward`."""
        return self.ranks[0]._forward(self.ranks, *batch)
