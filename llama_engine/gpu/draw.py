"""Each row's token as its sequence's parameters define it, in place of the greedy one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llama_engine.config import EngineConfig
from llama_engine.engine.step import Step
from llama_engine.gpu.batch import Batch
from llama_engine.gpu.chain import GpuModel
from llama_engine.kernels.sampler import Sampler
from llama_engine.model.sampler import logprobs
from llama_engine.sampling import SamplingParams


class Draw:
    """``params`` are those of each slot, ``graphs`` the sampler's by bucket; a bucket without one runs eagerly."""

    def __init__(self, model: GpuModel, engine: EngineConfig, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self.params = [SamplingParams()] * engine.max_batch_size
        self._sampler = Sampler(engine.max_batch_size, batch.buckets[-1], model.config.vocab_size, batch.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def bind(self, slot: int, params: SamplingParams, prompt: Sequence[int] | None, output: Sequence[int]) -> None:
        if params.mode or self.params[slot].mode:
            for target, values in self._sampler.updates(slot, params, prompt, output):
                self._batch.upload(target, values)
        self.params[slot] = params

    def kernel(self, bucket: int) -> None:
        m, batch = self._model, self._batch
        self._sampler.launch(m.logits, batch.sampled, batch.slots, m.last_token, m.position, bucket)

    def draw(self, step: Step, indices: list[int]) -> tuple[dict[int, SamplingParams], list[torch.Tensor]]:
        """Replace the greedy token of each row whose sequence asks for another; the rows' logits are the scratch.
        Returns :attr:`llama_engine.gpu.handle.Pass.logprobs`."""
        chunks, logits, sampled = [step.chunks[i] for i in indices], self._model.logits, self._batch.sampled
        params = [self.params[chunk.slot] for chunk in chunks]
        scored = [row for row, p in enumerate(params) if p.logprobs is not None]
        raw = torch.stack([logits[row] for row in scored]) if scored else None
        for row, i in enumerate(indices if step.forbidden else ()):
            if i in step.forbidden:
                self._forbid(row, torch.from_numpy(step.forbidden[i]))
        if any(p.mode for p in params):
            bucket = self._batch.name(chunks)
            if bucket in self.graphs:
                self.graphs[bucket].replay()
            else:
                self.kernel(bucket)
        if raw is None:
            return {}, []
        tokens = torch.stack([sampled[row] for row in scored])
        parts = logprobs(raw, tokens, max(params[row].logprobs for row in scored))
        return {indices[row]: params[row] for row in scored}, [self._batch.to_host(part) for part in parts]

    def _forbid(self, row: int, tokens: torch.Tensor) -> None:
        """Leave a row the largest of its other logits, and its id as the greedy one that the sampler starts from."""
        logits = self._model.logits[row]
        logits.masked_fill_(self._batch.to_device(tokens), -math.inf)
        ids = torch.arange(logits.numel(), device=logits.device)
        self._batch.sampled[row] = torch.where(logits == logits.amax(), ids, logits.numel()).amin()
