"""What ``ModelRunner`` asks of whatever runs an engine: the one request, checked, and answered step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from llama_engine.sampling import SamplingParams


@dataclass(frozen=True)
class Batch:
    """Prompts that are answered together. ``end_id`` below 0 never ends an answer.

    ``stop_words`` has for each prompt the words, each a list of ids, that end its answer too.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    params: SamplingParams
    end_id: int
    pad_id: int
    stop_words: list[list[list[int]]]
    streaming: bool

    @property
    def width(self) -> int:
        """Columns of ``output_ids``: the longest prompt and all that may be new."""
        return max(map(len, self.prompts)) + self.max_new_tokens


class Backend(Protocol):
    """A loaded engine of one kind, and the ids that end its model's answers."""

    eos_token_ids: tuple[int, ...]

    def answer(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``output_ids`` int32 ``[batch, 1, width]`` and lengths int32 ``[batch, 1]`` after each step.

        The call itself raises :class:`InputError` for a batch that this engine cannot answer; the iterator may raise
        :class:`RunError`. Unless ``batch.streaming``, the last pair will do.
        """
        ...
