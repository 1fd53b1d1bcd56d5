"""Tensor-parallel ranks, a GPU each, driven by one process.

Every rank is a :class:`CudaExecutor` with its share of the weights and KV heads, and runs the same steps. They exchange
partial sums and logits on the devices (:mod:`llama_engine.kernels.exchange`), after which all hold the same bits: each
samples by itself, and arrives at the same tokens. So only the first one's results are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.step import Step
from llama_engine.gpu.executor import CudaExecutor
from llama_engine.gpu.handle import CudaHandle, run_together
from llama_engine.model.weights import EngineWeights
from llama_engine.sampling import SamplingParams


class TensorParallelExecutor:
    """Implements :class:`llama_engine.engine.executor.Executor`; a model's bytes are those of one rank."""

    asynchronous = True

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        weights: Sequence[EngineWeights],
        *,
        tuning: dict | None = None,
        kernels: str = "auto",
        graphs: bool = True,
    ) -> None:
        """``config`` is a rank's share, ``weights`` are the ranks', each on a device of its own. Otherwise as
        :class:`CudaExecutor`. Raises :class:`RunError` where devices cannot reach each other's memory."""
        options = {"tuning": tuning, "kernels": kernels}
        self.ranks = [CudaExecutor(config, engine, part, rank=rank, **options) for rank, part in enumerate(weights)]
        self._connect()
        if graphs:
            for rank in self.ranks:
                rank.capture()
        self._reset()  # of what ran alone
        first = self.ranks[0]
        self.num_kv_blocks = min(rank.num_kv_blocks for rank in self.ranks)
        self.kernels = f"{first.kernels}, {len(weights)} ranks"
        self.step_nbytes, self.kv_nbytes_per_token = first.step_nbytes, first.kv_nbytes_per_token

    def _connect(self) -> None:
        exchanges = [rank.model.exchange for rank in self.ranks]
        decodes = [rank.persistent for rank in self.ranks]
        for exchange in exchanges:
            exchange.connect(exchanges)
        if None in decodes:  # where one has none, none runs it
            for rank in self.ranks:
                rank.persistent = None
        else:
            for decode in decodes:
                decode.connect(decodes, [rank.model.logits for rank in self.ranks])

    def _reset(self) -> None:
        """Forget what has been counted: all ranks begin to exchange anew."""
        self._synchronize()
        for rank in self.ranks:
            for part in (rank.model.exchange, rank.persistent):
                if part is not None:
                    part.reset()
        self._synchronize()

    def _synchronize(self) -> None:
        for rank in self.ranks:
            torch.cuda.synchronize(rank.device)

    def bind(self, slot: int, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> None:
        for rank in self.ranks:
            rank.bind(slot, params, prompt, output)

    def set_block_table(self, slot: int, blocks: Sequence[int]) -> None:
        for rank in self.ranks:
            rank.set_block_table(slot, blocks)

    def submit(self, step: Step) -> CudaHandle:
        return run_together(self.ranks, step)[0]
