"""A step of :class:`llama_engine.gpu.executor.CudaExecutor` on its way: what the host reads once the device is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_engine.engine.step import Step
from llama_engine.errors import RunError
from llama_engine.kernels.exchange import Exchange
from llama_engine.model.sampler import list_logprobs
from llama_engine.sampling import Logprobs, SamplingParams


@dataclass
class Pass:
    """What one pass over the model sends to the host. Chunks are named by their index in the step."""

    sampling: list[int]  # the chunks that end in a token
    ids: torch.Tensor  # their tokens, pinned int32
    logits: dict[int, torch.Tensor]  # [n, vocab] of the chunks for which they were asked
    logprobs: tuple[dict[int, SamplingParams], list[torch.Tensor]]  # which chunks ask, and sampling.logprobs pinned
    scored: dict[int, tuple[SamplingParams, list[torch.Tensor]]] = field(default_factory=dict)  # the same of prompts


class CudaHandle:
    """A step on its way. Reading waits for the device; in Triton's interpreter there is no event to wait for."""

    def __init__(self, passes: list[Pass], event: torch.cuda.Event | None, exchange: Exchange | None = None) -> None:
        self._passes, self._event, self._exchange = passes, event, exchange

    def _wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        if self._exchange is not None and self._exchange.error.item():
            raise RunError("a tensor-parallel rank waited for its peers in vain: restart the engine")

    def tokens(self) -> list[int | Exception]:
        self._wait()
        found = sorted(pair for part in self._passes for pair in zip(part.sampling, part.ids.tolist()))
        return [token for _, token in found]

    def logprobs(self) -> list[Logprobs | None]:
        if not any(part.logprobs[0] for part in self._passes):
            return [None] * sum(len(part.sampling) for part in self._passes)
        self._wait()
        found: dict[int, Logprobs | None] = {chunk: None for part in self._passes for chunk in part.sampling}
        for part in self._passes:
            params, tensors = part.logprobs
            if params:
                found |= zip(params, list_logprobs(list(params.values()), *tensors))
        return [found[chunk] for chunk in sorted(found)]

    def scored(self) -> dict[int, list[Logprobs]]:
        self._wait()
        found = {chunk: pair for part in self._passes for chunk, pair in part.scored.items()}
        return {chunk: list_logprobs([p] * len(parts[0]), *parts) for chunk, (p, parts) in found.items()}

    def logits(self) -> torch.Tensor:
        self._wait()
        pieces = {chunk: logits for part in self._passes for chunk, logits in part.logits.items()}
        if not pieces:
            raise ValueError("the step was submitted with logits='none'")
        return torch.cat([pieces[i] for i in sorted(pieces)])


def run_together(executors: Sequence[Any], step: Step) -> list[CudaHandle]:
    """Submit ``step`` to each executor, stage by stage: kernels of one rank wait for those of the others, so between
    their launches the host must do nothing that could wait for a device (allocate, load a kernel, copy from pageable
    memory)."""
    running = [executor.stages(step) for executor in executors]
    handles: list[CudaHandle] = []
    while not handles:
        for executor, stages in zip(executors, running):
            with torch.cuda.stream(executor._stream):
                try:
                    next(stages)
                except StopIteration as end:
                    handles.append(end.value)
    return handles
