"""The synchronous executor: any :class:`~llama_engine.model.llama.TorchModel` or one with its face, one pass a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu.fused import CpuModel, SampleView
from llama_engine.engine.executor import ReadyHandle
from llama_engine.engine.step import Chunk, Step
from llama_engine.model.llama import SplitModel, TorchModel
from llama_engine.model.sampler import list_logprobs, logprobs, sample
from llama_engine.model.weights import EngineWeights
from llama_engine.sampling import NOT_FINITE, RECENT, Logprobs, SamplingParams, count_tokens, recent_tokens


class HostExecutor:
    """Implements :class:`llama_engine.engine.executor.Executor` for a CPU, and for a GPU without fused kernels."""

    asynchronous = False

    def __init__(
        self,
        model: TorchModel | SplitModel | CpuModel,
        config: ModelConfig,
        engine: EngineConfig,
        weights: EngineWeights,
    ) -> None:
        self._model = model
        self.kernels = model.name
        self.num_kv_blocks = engine.num_kv_blocks
        self.step_nbytes = weights.step_nbytes
        self.kv_nbytes_per_token = config.kv_nbytes(engine.kv_element_nbytes)
        self._device = getattr(model, "device", torch.device("cpu"))
        slots = engine.max_batch_size
        self._last = [0] * slots
        self._params = [SamplingParams()] * slots
        self._counts: dict[int, torch.Tensor] = {}  # of the penalized slots
        self._recent = np.full((slots, RECENT), -1, np.int32)  # of those with bad words of several tokens
        self._views = [SampleView.of(self._params[0])] * slots  # of a CpuModel's sampler
        self._vocab_size = config.vocab_size
        self._tables = torch.zeros((slots, engine.max_blocks_per_sequence), dtype=torch.int32, device=self._device)

    def bind(self, slot: int, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> None:
        if params.penalized:
            self._counts[slot] = torch.from_numpy(count_tokens(prompt, output, self._vocab_size)).to(self._device)
        if params.phrases:
            self._recent[slot] = recent_tokens(prompt, output)
        self.rebind(slot, params)

    def rebind(self, slot: int, params: SamplingParams) -> None:
        self._params[slot] = params
        if isinstance(self._model, CpuModel):
            counts = self._counts[slot] if params.penalized else None
            self._views[slot] = SampleView.of(params, counts, self._recent[slot])

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
        rows = range(len(ids)) if step.every_row else last_rows
        ids, positions, slots, rows = (
            torch.tensor(values, dtype=torch.int32, device=self._device) for values in (ids, positions, slots, rows)
        )
        logits = self._model.forward(ids, positions, slots, self._tables, rows)
        ends = logits[last_rows] if step.every_row else logits
        chunks = [chunk for chunk in step.chunks if chunk.samples]
        scored = [row for row, chunk in enumerate(chunks) if self._params[chunk.slot].logprobs is not None]
        raw = ends[scored] if scored else None
        ends = ends.clone() if step.logits == "last" or step.forbidden else ends
        places = [i for i, chunk in enumerate(step.chunks) if chunk.samples] if step.forbidden else []
        for i, forbidden in step.forbidden.items():
            ends[places.index(i)].masked_fill_(torch.from_numpy(forbidden).to(self._device), -math.inf)
        sampled = self._sample(ends, chunks)
        # an id in any case, for whoever decodes on before the engine has read this step
        ids = [token if isinstance(token, int) and token != NOT_FINITE else 0 for token in sampled]
        for chunk, token in zip(chunks, ids):
            self._last[chunk.slot] = token
        found: list[Logprobs | None] = [None] * len(chunks)
        if raw is not None:
            params = [self._params[chunks[row].slot] for row in scored]
            tokens = torch.tensor([ids[row] for row in scored], device=self._device)
            parts = logprobs(raw, tokens, max(p.logprobs for p in params))
            for row, value in zip(scored, list_logprobs(params, *parts)):
                found[row] = value
        return ReadyHandle(sampled, None if step.logits == "none" else logits, found, self._score(step, logits))

    def _score(self, step: Step, logits: torch.Tensor) -> dict[int, list[Logprobs]]:
        """:attr:`Step.scored`, from the ``logits`` of every row."""
        found, row = {}, 0
        for i, chunk in enumerate(step.chunks):
            if tokens := step.scored.get(i):
                params = self._params[chunk.slot]
                targets = torch.tensor(tokens, device=self._device)
                parts = logprobs(logits[row : row + len(tokens)], targets, params.logprobs)
                found[i] = list_logprobs([params] * len(tokens), *parts)
            row += chunk.length
        return found

    def _sample(self, logits: torch.Tensor, chunks: list[Chunk]) -> list[int | Exception]:
        """The token of each row of ``logits`` ``[chunks, vocab]``, or what went wrong in it; ``logits`` is scratch."""
        with contextlib.suppress(Exception):  # in a row, which its own turn below will name
            return self._draw(logits, chunks)
        sampled: list[int | Exception] = []
        for row, chunk in enumerate(chunks):
            try:
                sampled += self._draw(logits[row : row + 1], [chunk])
            except Exception as error:  # this row's request ends, the others go on
                sampled.append(error)
        return sampled

    def _draw(self, logits: torch.Tensor, chunks: list[Chunk]) -> list[int]:
        positions = [chunk.start + chunk.length for chunk in chunks]
        if isinstance(self._model, CpuModel):
            return self._model.sampler.sample(logits, [self._views[chunk.slot] for chunk in chunks], positions)
        if not chunks:
            return []
        params = [self._params[chunk.slot] for chunk in chunks]
        counts = [self._counts.get(chunk.slot) if p.penalized else None for chunk, p in zip(chunks, params)]
        history = None
        if any(p.penalized for p in params):
            none = torch.zeros(self._vocab_size, dtype=torch.int16, device=self._device)
            history = torch.stack([none if count is None else count for count in counts])
        slots = [chunk.slot for chunk in chunks]
        tokens = sample(logits, params, positions, history, self._recent[slots]).tolist()
        for slot, position, token, count in zip(slots, positions, tokens, counts):
            if token == NOT_FINITE:
                continue
            self._recent[slot, position % RECENT] = token
            if count is not None:
                count[token] += 2 * (count[token] < 32766)
        return tokens
