"""Sampling parameters and the sampler, the same arithmetic on every device.

A draw depends only on ``(seed, position)`` and the logits, never on the batch or on global generator state, so a
sampled request gives the same tokens alone and in any batch.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from llama_engine.errors import InputError

_MASK = (1 << 64) - 1
COLDEST, HOTTEST = 2.0**-126, 2.0**126  # what float32 can divide by; the limits beyond are greedy and uniform
NOT_FINITE = -1  # sampled where no logit is the largest: NaN or infinity among them, or -infinity alone


@dataclass(frozen=True)
class SamplingParams:
    """How to pick the next token. ``temperature`` 0 (or below :data:`COLDEST`) or ``top_k`` 1 is greedy; ``top_k`` 0
    keeps all.

    Raises :class:`InputError` for a value of another type or outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_is(self.temperature, Real) and 0 <= self.temperature <= sys.float_info.max):
            raise InputError(f"temperature must be a finite number >= 0, got {self.temperature!r}")
        if not (_is(self.top_k, Integral) and 0 <= self.top_k < 1 << 31):
            raise InputError(f"top_k must be an integer in [0, 2**31), got {self.top_k!r}")
        if not (_is(self.top_p, Real) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not (_is(self.seed, Integral) and 0 <= self.seed <= _MASK):
            raise InputError(f"seed must be an integer in [0, 2**64), got {self.seed!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST or self.top_k == 1


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from ``(seed, position)``: the SplitMix64 finalizer (Steele, Lea, Flood 2014)."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


def sample(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """Pick one id from ``logits`` (float ``[vocab]``) for the token that will stand at ``position``.

    Temperature first, then top-k, then nucleus (the smallest set whose probability reaches ``top_p``; Holtzman et
    al. 2020), then the inverse of the cumulative distribution at :func:`uniform`. :data:`NOT_FINITE` where the largest
    logit is NaN (which PyTorch's reductions take for the largest) or infinite.
    """
    if params.greedy:
        token = int(torch.argmax(logits))
        return token if math.isfinite(float(logits[token])) else NOT_FINITE
    k = min(params.top_k or logits.numel(), logits.numel())
    values, ids = torch.topk(logits.float(), k)
    if not math.isfinite(float(values[0])):
        return NOT_FINITE
    # Differences first: divided by a small temperature they may overflow to -infinity, whose probability is 0.
    probabilities = torch.softmax((values - values[0]) / min(params.temperature, HOTTEST), dim=-1)
    cumulative = torch.cumsum(probabilities, dim=-1)
    kept = max(1, int((cumulative - probabilities < params.top_p).sum()))  # a top_p that float32 takes for 0 keeps one
    draw = uniform(params.seed, position) * float(cumulative[kept - 1])
    index = torch.searchsorted(cumulative, torch.tensor(draw, device=logits.device))
    return int(ids[min(int(index), kept - 1)])
