"""What a sampled token is: one definition, exact to the bit, and its reference in PyTorch.

Of a row of logits, in this order:

1. Penalties. A token of prompt or output: ``x > 0 ? x / repetition : x * repetition`` (the quotient as a product with
   the float32 reciprocal). A token of the output, which holds it ``n`` times: ``x - frequency * n - presence``.
2. ``logit_bias`` is added; ``banned`` tokens become -inf.
3. Temperature. With ``m`` the largest logit, ``t = (x - m) * (log2(e) / temperature)`` in float32, and the weight of a
   token is the integer part of ``2**t * 2**28``, by the polynomial :data:`EXP2`. Integers, because their sums do not
   depend on the order, so that every device keeps and draws the same token.
4. Tokens are ordered by (logit descending, id ascending). ``top_k`` keeps the first k; ``top_p`` the fewest of those
   whose weights reach that share of theirs (Holtzman et al. 2020); ``min_p`` those with ``t >= log2(min_p)``.
5. The draw: the first id, in id order, at which the kept weights add up to more than ``uniform(seed, position)`` times
   their sum. ``position`` is where the new token will stand. Nothing else enters, so a request gives the same tokens
   alone and in any batch.

Temperature 0, one too small to divide by, and ``top_k`` 1 are greedy: the largest processed logit, the lowest id of
equal ones. A row without a finite largest logit gives :data:`NO_TOKEN`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from llama_engine.errors import InputError

NO_TOKEN = -1  # the row is broken: NaN, infinity, or every token banned
MAX_BIAS = 512  # tokens a request may bias or ban
MAX_LOGPROBS = 20
# 2**f on [-0.5, 0.5] is 1 + EXP2[0] f + EXP2[1] f**2 ...: relative error 1e-7, each step rounded to float32.
EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.0013264723820611835)
# 1.5 * 2**23 + 28: adding it to t rounds t to an integer n, and leaves n + 28 in the lowest bits
SHIFT = 12582940.0
ONE = 1 << 30  # top_p 1
UNUSED, ARGMAX, DRAW = 0, 1, 2  # what a row needs besides the greedy token that the step has found already
_MASK = (1 << 64) - 1
# What a kernel reads of a slot's parameters: 16 words of 32 bits.
RECORD = np.dtype(
    [("mode", "i4"), ("top_k", "i4"), ("top_p", "i4"), ("num_bias", "i4"), ("penalized", "i4"), ("seed", "i4", 2)]
    + [("", "i4")]
    + [(name, "f4") for name in ("scale", "unscale", "floor", "repetition", "inverse", "frequency", "presence")]
    + [("", "f4")]
)


@dataclass(frozen=True)
class SamplingParams:
    """How to pick the next token; see the module. ``top_k`` 0 keeps all, as ``top_p`` 1 and ``min_p`` 0 do.

    ``logit_bias`` holds (id, bias) pairs. Raises :class:`InputError` for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    logprobs: int | None = None  # asks for the token's log-probability, and for those of so many most likely ones

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not 0 <= self.top_k < 1 << 31:
            raise InputError(f"top_k must be >= 0 and below 2**31, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed <= _MASK:
            raise InputError(f"seed must be in [0, 2**64), got {self.seed}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise InputError(f"repetition_penalty must be in [1e-6, 1e6], got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} must be in [-2, 2], got {getattr(self, name)}")
        for _, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise InputError(f"logit_bias must be in [-100, 100], got {bias}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InputError(f"logprobs must be in [0, {MAX_LOGPROBS}], got {self.logprobs}")
        if len(self.biases) > MAX_BIAS:
            raise InputError(f"logit_bias and banned name {len(self.biases)} tokens, at most {MAX_BIAS} are supported")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise :class:`InputError` for a biased or banned id that is no token."""
        for token in self.biases:
            if not 0 <= token < vocab_size:
                raise InputError(f"logit_bias or banned names token {token}, the vocabulary has 0 to {vocab_size - 1}")

    @cached_property
    def biases(self) -> dict[int, float]:
        """What is added to which token's logit."""
        return dict(self.logit_bias) | dict.fromkeys(self.banned, -math.inf)

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.temperature < 1e-37

    @property
    def mode(self) -> int:
        if not self.greedy:
            return DRAW
        return ARGMAX if self.penalized or self.biases else UNUSED

    @cached_property
    def record(self) -> np.ndarray:
        """These parameters as a kernel reads them, :data:`RECORD` ``[1]``."""
        row = np.zeros(1, RECORD)
        row["mode"], row["top_k"], row["top_p"] = self.mode, self.top_k, max(1, int(self.top_p * ONE))
        row["num_bias"], row["penalized"] = len(self.biases), self.penalized
        row["seed"] = np.array([self.seed], "<u8").view("<i4")
        if not self.greedy:
            scale = math.log2(math.e) / self.temperature
            row["scale"] = max(scale, 2**-126)  # no subnormals: devices differ
            row["unscale"] = min(1 / scale, 3e38)
        row["floor"] = math.log2(self.min_p) if self.min_p else -math.inf
        row["repetition"], row["inverse"] = self.repetition_penalty, 1 / self.repetition_penalty
        row["frequency"], row["presence"] = self.frequency_penalty, self.presence_penalty
        return row


@dataclass(frozen=True)
class Logprobs:
    """Natural log-probabilities under the raw logits: of the token, and of the most likely (id, value) pairs."""

    token: float
    top: list[tuple[int, float]]


def random_bits(seed: int, position: int) -> int:
    """53 bits from ``(seed, position)``: the SplitMix64 finalizer (Steele, Lea, Flood 2014)."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) >> 11


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from ``(seed, position)``."""
    return random_bits(seed, position) / (1 << 53)


def count_tokens(prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> np.ndarray:
    """A sequence's history for the penalties, int16 ``[vocab]``: twice the count in the output (which stops at 16,383),
    plus one for a token of the prompt."""
    counts = 2 * np.minimum(np.bincount(np.asarray(output, np.int64), minlength=vocab_size), 16383)
    counts[np.asarray(prompt, np.int64)] |= 1
    return counts.astype(np.int16)


def process(logits: torch.Tensor, params: Sequence[SamplingParams], counts: torch.Tensor | None) -> torch.Tensor:
    """Penalties and biases: float32 ``[rows, vocab]``, a copy. ``counts`` int16 ``[rows, vocab]`` as
    :func:`count_tokens` gives them; None when no row is penalized."""
    x = logits.float().clone()
    fields = _fields(params, x.device)
    if counts is not None:
        x = torch.where(counts != 0, x * torch.where(x > 0, fields["inverse"], fields["repetition"]), x)
        output = counts >> 1
        x = x - fields["frequency"] * output
        x = x - fields["presence"] * (output > 0)
    triples = [(row, *pair) for row, p in enumerate(params) for pair in p.biases.items()]
    if triples:
        rows, ids, biases = (torch.tensor(column, device=x.device) for column in zip(*triples))
        x[rows, ids] += biases.float()
    return x + 0.0  # -0 is 0


def weights(x: torch.Tensor, scale: torch.Tensor, floor: torch.Tensor | float = -math.inf) -> torch.Tensor:
    """Integer weights int64 of processed logits ``x`` ``[rows, vocab]``; ``scale`` and ``floor`` float32 ``[rows, 1]``.
    2**28 at most, zero below ``floor``."""
    t = (x - x.amax(dim=-1, keepdim=True)) * scale
    kept = t >= floor
    t = torch.where(t >= -40, t, -40.0)
    shifted = t + SHIFT
    f = t - (shifted - SHIFT)
    power = torch.full_like(f, EXP2[-1])
    for coefficient in (*EXP2[-2::-1], 1.0):
        power = power * f
        power = power + coefficient
    scaled = (power.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    return torch.where(kept, scaled.long(), 0)


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference: one id a row of ``logits`` ``[rows, vocab]``, int64 ``[rows]``, on any device without waiting."""
    x = process(logits, params, counts)
    vocab = x.shape[-1]
    fields = _fields(params, x.device)
    largest = x.amax(dim=-1, keepdim=True)
    ids = torch.arange(vocab, device=x.device)
    token = torch.where(x == largest, ids, vocab).amin(dim=-1)
    if not all(p.greedy for p in params):
        weight = weights(x, fields["scale"])
        keep = weights(x, fields["scale"], fields["floor"]) > 0
        if any(p.top_k or p.top_p < 1 for p in params):
            order = torch.sort(x, dim=-1, descending=True, stable=True).indices
            first = torch.where(fields["top_k"] > 0, fields["top_k"], vocab)
            ordered = weight.gather(-1, order) * (ids < first)
            before = ordered.cumsum(-1) - ordered
            enough = _times(fields["top_p"], ordered.sum(dim=-1, keepdim=True), ONE - 1)
            keep &= torch.zeros_like(keep).scatter_(-1, order, (before < enough) & (ids < first))
        weight = torch.where(keep, weight, 0)
        total = weight.sum(dim=-1, keepdim=True)
        bits = [random_bits(p.seed, position) for p, position in zip(params, positions)]
        target = _fraction(torch.tensor(bits, device=x.device)[:, None], total)
        drawn = (weight.cumsum(-1) <= target).sum(dim=-1)
        token = torch.where(fields["mode"][:, 0] == DRAW, drawn, token)
    return torch.where(torch.isfinite(largest[:, 0]), token, NO_TOKEN)


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, n: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under the raw ``logits`` ``[rows, vocab]``, without waiting for the device: of ``tokens``
    ``[rows]``, float32 ``[rows]``, and of the ``n`` most likely, ids int64 and values float32 ``[rows, n]``."""
    x = logits.float()
    norm = torch.logsumexp(x, dim=-1, keepdim=True)
    chosen = x.gather(-1, tokens.long().clamp(min=0)[:, None]) - norm
    values, ids = torch.topk(x, n, dim=-1)
    return chosen[:, 0], ids, values - norm


def list_logprobs(
    params: Sequence[SamplingParams], chosen: torch.Tensor, ids: torch.Tensor, values: torch.Tensor
) -> list[Logprobs]:
    """What :func:`logprobs` returned, once it is on the host, as each of its rows asked for it."""
    rows = zip(params, chosen.tolist(), ids.tolist(), values.tolist())
    return [Logprobs(token, list(zip(top, value))[: p.logprobs]) for p, token, top, value in rows]


def _fields(params: Sequence[SamplingParams], device: torch.device) -> dict[str, torch.Tensor]:
    """The parameters' records by field, ``[rows, 1]`` each."""
    records = np.concatenate([p.record for p in params])
    names = ("mode", "top_k", "top_p", "scale", "floor", "repetition", "inverse", "frequency", "presence")
    return {name: torch.from_numpy(records[name].copy()).to(device)[:, None] for name in names}


def _times(share: torch.Tensor, total: torch.Tensor, rounding: int) -> torch.Tensor:
    """``(share * total + rounding) >> 30`` for share <= 2**30 and total < 2**54, within 64 bits."""
    share = share.long()
    low = share * (total & 0xFFFFFF) + rounding
    return (share * (total >> 24) + (low >> 24)) >> 6


def _fraction(bits: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``(bits * total) >> 53`` for 53 bits and total < 2**50, within 64 bits."""
    found = torch.zeros_like(total)
    for first, width in ((0, 13), (13, 13), (26, 13), (39, 13), (52, 1)):
        found = (((bits >> first) & ((1 << width) - 1)) * total + found) >> width
    return found
