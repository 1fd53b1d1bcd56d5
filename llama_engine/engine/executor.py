"""What the engine asks of a device: run one step over a ragged batch of sequences.

The engine knows *positions* ahead of time but learns *tokens* late, so state that depends on tokens lives with the
executor: each running sequence owns a **slot** (0 .. max_batch_size - 1) whose last sampled token and block-table row
stay on the device. A decode step then needs nothing from the host but "again".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from llama_engine.engine.step import Step
from llama_engine.sampling import Logprobs, SamplingParams


class StepHandle(Protocol):
    """A submitted step. The methods wait for the device if they must."""

    def tokens(self) -> list[int | Exception]:
        """Sampled ids, one for each chunk with ``samples``, in chunk order.

        :data:`llama_engine.sampling.NOT_FINITE` where the logits are not finite; the exception where sampling a row
        raised one.
        """
        ...

    def logprobs(self) -> list[Logprobs | None]:
        """Log-probabilities of :meth:`tokens` whose sequences ask for them."""
        ...

    def scored(self) -> dict[int, list[Logprobs]]:
        """What :attr:`Step.scored` asked for."""
        ...

    def logits(self) -> torch.Tensor:
        """float32: ``[sampling chunks, vocab]`` for "last", ``[num_tokens, vocab]`` for "all"."""
        ...


class Executor(Protocol):
    """A model on a device. Steps run in submission order; later steps see the KV and tokens of earlier ones."""

    asynchronous: bool  # submit() returns before the device is done, so the engine may run one step ahead
    num_kv_blocks: int  # blocks in the KV cache; block 0 is scratch for padding and never allocated
    kernels: str  # which implementation runs, for reports: "torch", "cpu-avx512", "cuda-tiled", ...
    step_nbytes: int  # weight bytes one decode step reads, on one GPU of several
    kv_nbytes_per_token: int  # KV bytes one position holds over all layers, on one GPU of several

    def bind(self, slot: int, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> None:
        """Give ``slot`` to a new sequence with these sampling parameters; penalties count the tokens so far."""
        ...

    def rebind(self, slot: int, params: SamplingParams) -> None:
        """From the next step on, other parameters for the slot's sequence. They are penalized, and have bad words of
        several tokens, where those before are and had: what has been counted goes on counting."""
        ...

    def set_block_table(self, slot: int, blocks: Sequence[int]) -> None:
        """Set the slot's whole block table; position p lives in ``blocks[p // tokens_per_block]``."""
        ...

    def submit(self, step: Step) -> StepHandle:
        """Enqueue one step."""
        ...


@dataclass
class ReadyHandle:
    """The handle of an executor that has already finished."""

    sampled: list[int | Exception]
    step_logits: torch.Tensor | None = field(default=None)
    step_logprobs: list[Logprobs | None] = field(default_factory=list)
    step_scored: dict[int, list[Logprobs]] = field(default_factory=dict)

    def tokens(self) -> list[int | Exception]:
        return self.sampled

    def logprobs(self) -> list[Logprobs | None]:
        return self.step_logprobs or [None] * len(self.sampled)

    def scored(self) -> dict[int, list[Logprobs]]:
        return self.step_scored

    def logits(self) -> torch.Tensor:
        if self.step_logits is None:
            raise ValueError("the step was submitted with logits='none'")
        return self.step_logits
