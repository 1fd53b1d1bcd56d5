"""One step, as the scheduler plans it and an executor runs it: chunks of sequences, named by their slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np


class Chunk(NamedTuple):  # there are hundreds in a step, and a frozen dataclass takes three times as long to make
    """Part of one sequence to run in this step.

    ``tokens`` are the input ids at positions ``start .. start + len(tokens) - 1`` (prefill), or None to decode: the
    one input is the token that the slot sampled last. ``samples`` is true when the chunk ends at the sequence's last
    known position, so that a new token is sampled from its final logits.
    """

    slot: int
    start: int
    tokens: Sequence[int] | None = None
    samples: bool = True

    @property
    def length(self) -> int:
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(frozen=True)
class Step:
    """One forward pass: chunks of distinct slots. ``logits`` asks for logits besides the sampled tokens.

    ``scored`` names chunks of prefill by their index, each with the ids that follow its first rows: their
    log-probabilities are wanted, as the slot's parameters say. ``forbidden``, bool ``[vocab]``, are the tokens that a
    chunk, by its index, may not sample; its slot's parameters are ``masked``.
    """

    chunks: tuple[Chunk, ...]
    logits: Literal["none", "last", "all"] = "none"
    scored: Mapping[int, Sequence[int]] = field(default_factory=dict)
    forbidden: Mapping[int, np.ndarray] = field(default_factory=dict)

    @property
    def every_row(self) -> bool:
        return self.logits == "all" or bool(self.scored)
