"""What a step's rows are on the device: their slots, their tokens, their block tables, and the copies to and fro."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llama_engine.config import EngineConfig
from llama_engine.engine.step import Chunk
from llama_engine.errors import InputError
from llama_engine.gpu import buckets
from llama_engine.gpu.chain import GpuModel


class Batch:
    """``slots`` ``[max_batch_size]`` int32 names the sequence of each row, ``sampled`` int32 holds its token."""

    def __init__(self, model: GpuModel, engine: EngineConfig) -> None:
        self._model, self._most = model, engine.max_batch_size
        self.device = model.x.device
        self._cuda = self.device.type == "cuda"
        self.buckets = [b for b in buckets.DECODE_BUCKETS if b < engine.max_batch_size] + [engine.max_batch_size]
        self.slots = torch.full((self.buckets[-1],), model.dummy_slot, dtype=torch.int32, device=self.device)
        self.sampled = torch.zeros(max(self.buckets[-1], 64), dtype=torch.int32, device=self.device)
        self._named: list[int] = []
        self.new_tables: dict[int, np.ndarray] = {}

    def name(self, chunks: Sequence[Chunk]) -> int:
        """Name the slots of the first rows on the device; returns the bucket that holds them. Raises
        :class:`InputError` for more than the engine holds."""
        slots = [chunk.slot for chunk in chunks]
        bucket = buckets.bucket_of(len(slots), self.buckets)
        if bucket is None:
            raise InputError(f"{len(slots)} sequences in a step, the engine holds {self._most}")
        padded = slots + [self._model.dummy_slot] * (bucket - len(slots))
        if padded != self._named:
            self.upload(self.slots, np.asarray(padded, dtype=np.int32))
            self._named = padded
        return bucket

    def upload(self, target: torch.Tensor, values: np.ndarray) -> None:
        """Copy ``values`` to the front of ``target`` in stream order, through pinned memory of their own."""
        host = torch.from_numpy(values)
        target[: host.numel()].copy_(host.pin_memory() if self._cuda else host, non_blocking=True)

    def upload_tables(self) -> None:
        """Bring all new block tables over at once: sequences that began together cross into new blocks together."""
        if not self.new_tables:
            return
        slots, tables = np.array(list(self.new_tables)), list(self.new_tables.values())
        rows = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for row, table in zip(rows, tables):
            row[: len(table)] = table
        index, source = (self.to_device(torch.from_numpy(values)) for values in (slots, rows))
        self._model.block_tables[:, : rows.shape[1]].index_copy_(0, index, source)
        self.new_tables.clear()

    def to_device(self, values: torch.Tensor) -> torch.Tensor:
        return (values.pin_memory() if self._cuda else values).to(self.device, non_blocking=True)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
        return host.copy_(tensor, non_blocking=True)
