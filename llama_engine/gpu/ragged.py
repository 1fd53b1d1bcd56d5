"""The inputs of a prefill of several chunks, packed into one buffer that the host fills with one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llama_engine.config import EngineConfig
from llama_engine.engine.step import Chunk
from llama_engine.kernels.attention import PagedAttention


class RaggedInputs:
    """Views of one int32 buffer on the device, which graphs read from fixed places."""

    def __init__(
        self, engine: EngineConfig, attention: PagedAttention, dummy_slot: int, tokens: int, chunks: int
    ) -> None:
        """Room for ``tokens`` in ``chunks`` chunks of a graph, or for what one step of ``engine`` may hold."""
        self._attention, self._dummy, self._max_samples = attention, dummy_slot, engine.max_batch_size
        size = max(tokens, engine.max_num_tokens)
        num_tiles = tokens // attention.query_tokens + chunks
        length = 3 * size + 4 * (num_tiles + size) + 3 * engine.max_batch_size + 256
        self.buffer = torch.zeros(length, dtype=torch.int32, device=attention.block_tables.device)

    def views(self, tokens: int, num_tiles: int, samples: int) -> tuple[torch.Tensor, ...]:
        """ids, slots, positions, tiles and ends over the one input buffer."""
        sizes = (tokens, tokens, tokens, 4 * num_tiles, 3 * samples)
        padded = [-(-size // 4) * 4 for size in sizes]  # 16-byte alignment
        parts = [p[:n] for p, n in zip(self.buffer[: sum(padded)].split(padded), sizes)]
        return *parts[:3], parts[3].view(num_tiles, 4), parts[4].view(3, samples)

    def pack(
        self,
        chunks: list[Chunk],
        tokens: int,
        max_chunks: int | None,
        decodes: Sequence[Chunk] = (),
        before: int = 0,
    ) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
        """What to copy to :attr:`buffer`, and its views: a ragged batch, padded to ``tokens`` rows and, for a graph, to
        ``max_chunks`` chunks; ``decodes``, padded to ``before`` rows, go first."""
        attention, dummy = self._attention, self._dummy
        tiles: list[tuple[int, int, int, int]] = []
        ends = [(i, chunk.slot, chunk.start + 1) for i, chunk in enumerate(decodes)]
        row = 0
        for chunk in chunks:
            tiles += attention.tiles(row, chunk.start, chunk.length, chunk.slot)
            row += chunk.length
            if chunk.samples:
                ends.append((before + row - 1, chunk.slot, chunk.start + chunk.length))
        num_tiles, samples = len(tiles), len(ends)
        if max_chunks is not None:
            num_tiles, samples = self.graph_shape(tokens, max_chunks, before)
        views = self.views(before + tokens, num_tiles, samples)
        offsets = [view.storage_offset() for view in views]
        host = np.zeros(offsets[-1] + views[-1].numel(), dtype=np.int32)
        host[before:][:row] = np.concatenate([np.asarray(chunk.tokens, dtype=np.int32) for chunk in chunks])
        slots, positions = host[offsets[1] :], host[offsets[2] + before :]
        slots[: before + tokens] = dummy
        slots[: len(decodes)] = [chunk.slot for chunk in decodes]
        slots[before:][:row] = np.repeat([chunk.slot for chunk in chunks], [chunk.length for chunk in chunks])
        positions[:row] = np.concatenate([np.arange(c.start, c.start + c.length, dtype=np.int32) for c in chunks])
        host[offsets[3] :][: 4 * len(tiles)] = np.asarray(tiles, dtype=np.int32).ravel()
        table = host[offsets[4] :].reshape(3, samples)
        table[1] = dummy
        if ends:
            table[:, : len(ends)] = np.asarray(ends, dtype=np.int32).T
        return host, views

    def graph_shape(self, tokens: int, max_chunks: int, decodes: int = 0) -> tuple[int, int]:
        """Query tiles and samples of a prefill graph."""
        samples = min(max_chunks + decodes, self._max_samples)
        return -(-tokens // self._attention.query_tokens) + max_chunks - 1, samples

    def blank(self, tokens: int, max_chunks: int, decodes: int = 0) -> tuple[torch.Tensor, ...]:
        """The views of a prefill graph, all padding: what a graph is captured over."""
        views = self.views(decodes + tokens, *self.graph_shape(tokens, max_chunks, decodes))
        self.buffer.zero_()
        views[1].fill_(self._dummy)
        views[4][1].fill_(self._dummy)
        return views
