"""The synchronous executor: any :class:`~llama_engine.model.TorchModel` or one with its face, one pass a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.executor import ReadyHandle, Step
from llama_engine.kernels.cpu import CpuModel
from llama_engine.model import TorchModel
from llama_engine.sampling import SamplingParams, sample
from llama_engine.weights import EngineWeights


class HostExecutor:
    """Implements :class:`llama_engine.executor.Executor` for a CPU, and for a GPU without fused kernels."""

    asynchronous = False

    def __init__(
        self,
        model: TorchModel | CpuModel,
        config: ModelConfig,
        engine: EngineConfig,
        weights: EngineWeights,
    ) -> None:
        self._model = model
        self.kernels = model.name
        self.num_kv_blocks = engine.num_kv_blocks
        self.step_nbytes = weights.step_nbytes
        self.kv_nbytes_per_token = 2 * config.num_layers * config.kv_size * 2
        self._device = getattr(model, "device", torch.device("cpu"))
        slots = engine.max_batch_size
        self._last = [0] * slots
        self._params = [SamplingParams()] * slots
        self._tables = torch.zeros((slots, engine.max_blocks_per_sequence), dtype=torch.int32, device=self._device)

    def bind(self, slot: int, params: SamplingParams) -> None:
        self._params[slot] = params

    def set_block_table(self, slot: int, blocks: Sequence[int]) -> None:
        self._tables[slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def submit(self, step: Step) -> ReadyHandle:
        ids, positions, slots, last_rows = [], [], [], []
        for chunk in step.chunks:
            ids += [self._last[chunk.slot]] if chunk.tokens is None else chunk.tokens
            positions += range(chunk.start, chunk.start + chunk.length)
            slots += [chunk.slot] * chunk.length
            if chunk.samples:
                last_rows.append(len(ids) - 1)
        rows = range(len(ids)) if step.logits == "all" else last_rows
        ids, positions, slots, rows = (
            torch.tensor(values, dtype=torch.int32, device=self._device) for values in (ids, positions, slots, rows)
        )
        logits = self._model.forward(ids, positions, slots, self._tables, rows)
        sampled = []
        for chunk, row in zip((chunk for chunk in step.chunks if chunk.samples), last_rows):
            index = row if step.logits == "all" else len(sampled)
            row_logits, position = logits[index : index + 1], chunk.start + chunk.length
            self._last[chunk.slot] = int(sample(row_logits, [self._params[chunk.slot]], [position]))
            sampled.append(self._last[chunk.slot])
        return ReadyHandle(sampled, None if step.logits == "none" else logits)
