"""Sampling parameters and the sampler, the same arithmetic on every device.

A draw depends only on ``(seed, position)`` and the logits, never on the batch or on global generator state, so a
sampled request gives the same tokens alone and in any batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llama_engine.errors import InputError

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to pick the next token. ``temperature`` 0 or ``top_k`` 1 is greedy; ``top_k`` 0 keeps all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed <= _MASK:
            raise InputError(f"seed must be in [0, 2**64), got {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from ``(seed, position)``: the SplitMix64 finalizer (Steele, Lea, Flood 2014)."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


def sample(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """Pick one id from ``logits`` (float ``[vocab]``) for the token that will stand at ``position``.

    Temperature first, then top-k, then nucleus (the smallest set whose probability reaches ``top_p``; Holtzman et
    al. 2020), then the inverse of the cumulative distribution at :func:`uniform`.
    """
    if params.greedy:
        return int(torch.argmax(logits))
    k = min(params.top_k or logits.numel(), logits.numel())
    values, ids = torch.topk(logits.float() / params.temperature, k)
    probabilities = torch.softmax(values, dim=-1)
    cumulative = torch.cumsum(probabilities, dim=-1)
    keep = cumulative - probabilities < params.top_p
    mass = float(cumulative[keep][-1])
    index = torch.searchsorted(cumulative, torch.tensor(uniform(params.seed, position) * mass, device=logits.device))
    return int(ids[min(int(index), int(keep.sum()) - 1)])
