"""The Llama forward pass as a chain of fused kernels over static buffers, so that it can be captured into a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError, RunError
from llama_engine.gpu.linears import Linears, checked_weights
from llama_engine.kernels import gemm, quant
from llama_engine.kernels.attention import PagedAttention
from llama_engine.kernels.common import has_e4m3
from llama_engine.kernels.exchange import Added, Exchange
from llama_engine.kernels.gemm import LM_HEAD_ROWS
from llama_engine.kernels.greedy import greedy
from llama_engine.kernels.tiles import Tiles, gpu_name
from llama_engine.model.schemes import KV_DTYPES
from llama_engine.model.weights import EngineWeights, Linear

ALL_LAYERS = slice(None)
ROW_PADDING = 128  # buffers hold a multiple of the largest tile's rows


class GpuModel:
    """Weights, KV cache, slot state and buffers of one model on one GPU.

    Slot state: ``last_token`` and ``position`` int32 ``[max_batch_size + 1]`` and ``block_tables`` int32
    ``[max_batch_size + 1, max_blocks_per_sequence]``; the last slot is the padding's (see :mod:`llama_engine.kernels`).
    """

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        weights: EngineWeights,
        tiles: Tiles,
        streaming: bool = True,
        rank: int = 0,
    ) -> None:
        """``streaming``: see :class:`Linears`. Of one of ``engine.tp_size`` ranks, ``config`` is its share, and
        :attr:`exchange` is to be connected."""
        self.config, self.engine_config = config, engine
        self.weights = checked_weights(config, weights)
        self.device = device = weights.embedding.device
        slots = engine.max_batch_size + 1
        capacity = -(-engine.max_num_tokens // ROW_PADDING) * ROW_PADDING
        self.dummy_slot = slots - 1

        def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.last_token, self.position = zeros(slots, dtype=torch.int32), zeros(slots, dtype=torch.int32)
        self.block_tables = zeros(slots, engine.max_blocks_per_sequence, dtype=torch.int32)
        self.x = zeros(capacity, config.hidden_size)
        self.x_ends = zeros(slots + ROW_PADDING, config.hidden_size)
        self.qkv = zeros(capacity, config.qkv_size)
        self.attended = zeros(capacity, config.q_size)
        ranks, hidden = engine.tp_size, zeros(capacity, config.intermediate_size)
        self.linears = Linears(config, self.weights, tiles, hidden, streaming, split=ranks > 1)
        self.exchange: Exchange | None = None
        if ranks > 1:
            columns = self.weights.lm_head.shape[0]
            self.exchange = Exchange(device, rank, ranks, capacity, config.hidden_size, columns)
        self.logits = zeros(engine.max_batch_size, config.vocab_size, dtype=torch.float32)
        self.attention = PagedAttention(config, engine, self.block_tables)
        self.kv = self._allocate_kv()

    def _allocate_kv(self) -> list[torch.Tensor]:
        c, e = self.config, self.engine_config
        block = c.kv_nbytes(e.kv_element_nbytes) * e.tokens_per_block
        blocks = e.num_kv_blocks
        if not blocks:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 1 << 30
            blocks = min(e.useful_kv_blocks, int(free * e.kv_cache_free_gpu_memory_fraction) // block)
        if blocks < 2:
            raise RunError(
                f"no GPU memory is left for the KV cache (one block of {e.tokens_per_block} tokens takes "
                f"{block} bytes): free some, or build the engine with a smaller max_num_tokens"
            )
        shape = (2, blocks, c.num_kv_heads, e.tokens_per_block, c.head_size)
        dtype = KV_DTYPES[e.kv_cache]
        if e.kv_cache == "fp8" and not has_e4m3(self.device):
            raise InputError(f"{gpu_name(self.device)} holds no FP8 KV cache: that needs sm89 (Ada) or later")
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(c.num_layers)]

    def run_linear(self, name: str, index: int, rows: int, tile: gemm.Tile | None = None) -> None:
        """Matrix ``name`` of layer ``index`` as the chain runs it; with ``tile``, compile that without running it."""
        linears = self.linears.named(name)
        out = {"qkv": self.qkv, "gate_up": self.linears.hidden, "lm_head": self.logits}.get(name, self.x)
        if self.exchange and name == "lm_head":
            out = self.exchange.logits(0).mine
        self.linears.run(name, linears[index % len(linears)], out, rows, tile)

    def _add(self, name: str, linear: Linear, x: torch.Tensor, rows: int) -> Added | None:
        """o or down; what it leaves is in ``x``, but for what is returned."""
        if self.exchange is None:
            return self.linears.run(name, linear, x, rows)
        parts = self.exchange.sum(name)
        self.linears.run(name, linear, parts.mine, rows)
        return self.exchange, parts

    def _layers(
        self,
        rows: int,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None],
        ends: torch.Tensor | None = None,
        part: slice = ALL_LAYERS,
    ) -> torch.Tensor:
        """``part`` of the decoder layers over ``x[:rows]``; ``attend(kv, out, scale)`` makes the activations of ``o``
        out of ``qkv``.

        Returns the buffer whose first rows hold the result: all of them, or with ``ends`` (int32 ``[n]``) only these,
        which then are all that the last layer computes once its keys and values are cached.
        """
        x = self.x
        eps = self.config.rms_norm_eps
        rest = None  # what x still lacks
        for layer, kv in list(zip(self.weights.layers, self.kv))[part]:
            quant.norm(self.x, layer.input_norm, eps, *self.linears.input_of("qkv", layer.qkv, rows), rows, add=rest)
            self.linears.run("qkv", layer.qkv, self.qkv, rows)
            query = self.linears.input_of("o", layer.o, rows)
            attend(kv, *query)
            if ends is not None and layer is self.weights.layers[-1]:
                rows = ends.numel()
                query = self.linears.input_of("o", layer.o, rows)
                quant.quantize_rows(self.attended, *query, rows, ends)
                quant.gather_rows(self.x, ends, self.x_ends, rows)
                x = self.x_ends
            rest = self._add("o", layer.o, x, rows)
            normed = self.linears.input_of("gate_up", layer.gate_up, rows)
            quant.norm(x, layer.post_norm, eps, *normed, rows, add=rest)
            self.linears.gate_up(layer.gate_up, layer.down, rows)
            rest = self._add("down", layer.down, x, rows)
        if rest is not None:
            quant.add_rows(x, rest, rows)
        return x

    def _head(
        self, x: torch.Tensor, rows: int, which: torch.Tensor | None, logits: torch.Tensor, piece: int = 0
    ) -> int:
        """Logits float32 ``[rows, vocab]`` of ``x`` or ``x[which]``, LM_HEAD_ROWS at most, the ``piece``-th of a pass;
        returns the tiles' count."""
        c, head = self.config, self.weights.lm_head
        quant.norm(
            x, self.weights.final_norm, c.rms_norm_eps, *self.linears.input_of("lm_head", head, rows), rows, which
        )
        if self.exchange:
            parts = self.exchange.logits(piece)
            self.linears.run("lm_head", head, parts.mine, rows)
            return self.exchange.gather_logits(parts, logits, self.linears.partials, rows)
        self.linears.run("lm_head", head, logits, rows)
        return -(-c.vocab_size // self.linears.tiles.get("lm_head", head, rows).n)

    def _sample(
        self,
        x: torch.Tensor,
        rows: int,
        which: torch.Tensor | None,
        slots: torch.Tensor,
        sampled: torch.Tensor,
        next_position: torch.Tensor | None,
    ) -> None:
        for first in range(0, rows, LM_HEAD_ROWS):
            piece = slice(first, min(rows, first + LM_HEAD_ROWS))
            n = piece.stop - first
            # ``which`` counts from the top of x, an implicit row from the top of the piece
            picked = None if which is None else which[piece]
            source, turn = x if which is not None else x[first:], first // LM_HEAD_ROWS
            num_tiles = self._head(source, n, picked, self.logits[piece], turn)
            following = None if next_position is None else next_position[piece]
            state = (slots[piece], self.last_token, self.position)
            greedy(self.linears.partials, num_tiles, sampled[piece], *state, n, following)

    def decode(self, slots: torch.Tensor, sampled: torch.Tensor) -> None:
        """One token for each of ``slots`` (int32 ``[rows]``): greedy ids to ``sampled`` and the slots, logits to
        ``logits[:rows]``, positions advanced."""
        rows = slots.numel()
        quant.gather_rows(self.weights.embedding, self.last_token, self.x, rows, slots)
        x = self._layers(
            rows,
            lambda kv, *out: self.attention.decode(self.qkv, kv, slots, self.position, *out, rows),
        )
        self._sample(x, rows, None, slots, sampled, None)

    def prefill(
        self,
        ids: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        tiles: torch.Tensor,
        ends: torch.Tensor,
        sampled: torch.Tensor,
        every_row: bool = False,
        part: slice = ALL_LAYERS,
        decodes: int = 0,
    ) -> None:
        """Run the tokens ``ids`` (int32 ``[T]``, at ``positions`` of ``slots``) in the query ``tiles`` of
        :meth:`PagedAttention.tiles`. ``ends`` int32 ``[3, n]``: the row, slot and next position of each sample.
        ``every_row`` also finishes the rows that are not sampled, for :meth:`all_logits`. ``part``: only these layers,
        the first with the embedding and the last with the sampling.
        The first ``decodes`` rows each decode their slot instead (``ids`` and ``positions`` of them are not read, and
        ``every_row`` is a must); the ``tiles`` count the rows after them."""
        rows, d = ids.numel(), decodes
        if d and not part.start:
            quant.gather_rows(self.weights.embedding, self.last_token, self.x, d, slots)
        if not part.start:
            quant.gather_rows(self.weights.embedding, ids[d:], self.x[d:], rows - d)

        def attend(kv: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None) -> None:
            if d:
                self.attention.decode(self.qkv, kv, slots, self.position, out, scale, d)
            new = (slots[d:], positions[d:], tiles, self.attended[d:], rows - d)
            self.attention.prefill(self.qkv[d:], kv, *new)
            rest = None if scale is None else scale[d:]
            quant.quantize_rows(self.attended[d:], out[..., d:, :], rest, rows - d)

        count = ends.shape[1]
        x = self._layers(rows, attend, ends[0] if count and not every_row else None, part)
        if count and part.stop is None:
            self._sample(x, count, ends[0] if every_row else None, ends[1], sampled, ends[2])

    def sample_step(self, rows: int, prefill: bool = False, context: int = 256) -> Callable[[], None]:
        """A decode of ``rows`` sequences after ``context`` tokens, or a prefill of ``rows`` tokens, over scratch: for
        timing. Leaves the slot state meaningless."""

        def ints(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        sampled = ints(*[0] * rows)
        if prefill:
            step = min(rows, self.engine_config.max_seq_len)
            starts = range(0, rows, step)
            tiles = [t for first in starts for t in self.attention.tiles(first, 0, min(step, rows - first), 0)]
            positions = ints(*(i % step for i in range(rows)))
            table = ints(*(i for tile in tiles for i in tile)).view(-1, 4)
            inputs = (sampled, sampled, positions, table, ints(rows - 1, 0, 0).view(3, 1))
            return lambda: self.prefill(*inputs, self.last_token)
        slots = ints(*range(rows))  # at most max_batch_size of them

        def decode() -> None:
            self.position.fill_(min(context, self.engine_config.max_seq_len - 1))
            self.decode(slots, sampled)

        return decode

    def all_logits(self, which: torch.Tensor, out: torch.Tensor, sampled: int) -> None:
        """Logits float32 ``[n, vocab]`` to ``out`` of the rows ``which`` (int32 ``[n]``) of the prefill that just ran
        and ``sampled`` so many rows, LM_HEAD_ROWS rows at a time."""
        before = -(-sampled // LM_HEAD_ROWS)
        for first in range(0, len(which), LM_HEAD_ROWS):
            piece = slice(first, min(len(which), first + LM_HEAD_ROWS))
            self._head(self.x, piece.stop - first, which[piece], out[piece], before + first // LM_HEAD_ROWS)
