"""What a sampled token is: one definition, exact to the bit. The reference is :mod:`llama_engine.model.sampler`.

Of a row of logits, in this order:

1. Penalties. A token of prompt or output: ``x > 0 ? x / repetition : x * repetition`` (the quotient as a product with
   the float32 reciprocal). A token of the output, which holds it ``n`` times: ``x - frequency * n - presence``.
2. ``logit_bias`` is added. The last token of a bad word becomes -inf wherever the sequence, prompt included, ends in
   the tokens before it; so a bad word of one token always does. What ends an answer is such a word until
   ``min_tokens`` of it are out.
3. Temperature. With ``m`` the largest logit, ``t = (x - m) * (log2(e) / temperature)`` in float32, and the weight of a
   token is the integer part of ``2**t * 2**28``, by the polynomial :data:`EXP2`. Integers, because their sums do not
   depend on the order, so that every device keeps and draws the same token.
4. Tokens are ordered by (logit descending, id ascending). ``top_k`` keeps the first k; ``top_p`` the fewest of those
   whose weights reach that share of theirs (Holtzman et al. 2020); ``min_p`` those with ``t >= log2(min_p)``.
5. The draw: the first id, in id order, at which the kept weights add up to more than ``uniform(seed, position)`` times
   their sum. ``position`` is where the new token will stand. Nothing else enters, so a request gives the same tokens
   alone and in any batch.

Temperature 0, one too small to divide by, and ``top_k`` 1 are greedy: the largest processed logit, the lowest id of
equal ones. A row without a finite largest logit gives :data:`NOT_FINITE`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real

import numpy as np

from llama_engine.errors import InputError

NOT_FINITE = -1  # what a row without a finite largest logit gives: NaN, infinity, or every token banned
MAX_BIAS = 512  # tokens a request may bias or ban
MAX_PHRASE_TOKENS = 512  # of its bad words of several tokens
RECENT = 32  # tokens of such a word, and so of the sequence that matter; a power of two
MAX_LOGPROBS = 20
# 2**f on [-0.5, 0.5] is 1 + EXP2[0] f + EXP2[1] f**2 ...: relative error 1e-7, each step rounded to float32.
EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.0013264723820611835)
# 1.5 * 2**23 + 28: adding it to t rounds t to an integer n, and leaves n + 28 in the lowest bits
SHIFT = 12582940.0
ONE = 1 << 30  # top_p 1
UNUSED, ARGMAX, DRAW = 0, 1, 2  # what a row needs besides the greedy token that the step has found already
_MASK = (1 << 64) - 1
COLDEST = 2.0**-126  # the smallest temperature that float32 can divide by; below it a draw is greedy
# What a kernel reads of a slot's parameters: 16 words of 32 bits.
RECORD = np.dtype(
    [("mode", "i4"), ("top_k", "i4"), ("top_p", "i4"), ("num_bias", "i4"), ("penalized", "i4"), ("seed", "i4", 2)]
    + [("num_phrases", "i4")]
    + [(name, "f4") for name in ("scale", "unscale", "floor", "repetition", "inverse", "frequency", "presence")]
    + [("", "f4")]
)


@dataclass(frozen=True)
class SamplingParams:
    """How to pick the next token; see the module. ``top_k`` 0 keeps all, as ``top_p`` 1 and ``min_p`` 0 do.

    ``logit_bias`` holds (id, bias) pairs, ``bad_words`` words of one or several ids. Raises :class:`InputError` for a
    value of another type or out of its range.
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
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None  # asks for the token's log-probability, and for those of so many most likely ones
    masked: bool = False  # each step forbids tokens of its own: see Step.forbidden
    prompt_logprobs: bool = False  # asks for them of the prompt's tokens too, from the second on

    def __post_init__(self) -> None:
        self._check("temperature", Real, 0, sys.float_info.max)
        self._check("top_k", Integral, 0, (1 << 31) - 1)
        self._check("top_p", Real, 0, 1)
        if self.top_p == 0:
            raise InputError("top_p must be above 0")
        self._check("seed", Integral, 0, _MASK)
        self._check("min_p", Real, 0, 1)
        self._check("repetition_penalty", Real, 1e-6, 1e6)
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, Real, -2, 2)
        for token, bias in self.logit_bias:
            if not (_is(token, Integral) and _is(bias, Real) and -100 <= bias <= 100):
                raise InputError(f"logit_bias must give token ids numbers in [-100, 100], got {token!r}: {bias!r}")
        for word in self.bad_words:
            if not (1 <= len(word) <= RECENT and all(_is(token, Integral) for token in word)):
                raise InputError(f"bad_words must hold words of 1 to {RECENT} token ids, got {word!r}")
        if (count := sum(map(len, self.phrases))) > MAX_PHRASE_TOKENS:
            raise InputError(f"bad_words holds words of {count} tokens, at most {MAX_PHRASE_TOKENS} are supported")
        if self.logprobs is not None:
            self._check("logprobs", Integral, 0, MAX_LOGPROBS)
        elif self.prompt_logprobs:
            raise InputError("prompt_logprobs needs logprobs")
        if len(self.biases) > MAX_BIAS:
            count = len(self.biases)
            raise InputError(
                f"logit_bias, bad_words and what min_tokens holds back name {count} tokens, at most {MAX_BIAS} are "
                "supported"
            )

    def _check(self, name: str, kind: type, low: float, high: float) -> None:
        value = getattr(self, name)
        if not (_is(value, kind) and low <= value <= high):
            what = "an integer" if kind is Integral else "a number"
            raise InputError(f"{name} must be {what} in [{low:g}, {high:g}], got {value!r}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise :class:`InputError` for an id in ``logit_bias`` or ``bad_words`` that is no token."""
        for token in (*self.biases, *itertools.chain(*self.phrases)):
            if not 0 <= token < vocab_size:
                last = vocab_size - 1
                raise InputError(f"logit_bias or bad_words names token {token}, the vocabulary has 0 to {last}")

    @cached_property
    def biases(self) -> dict[int, float]:
        """What is added to which token's logit, wherever it stands."""
        return dict(self.logit_bias) | {word[0]: -math.inf for word in self.bad_words if len(word) == 1}

    @cached_property
    def phrases(self) -> list[tuple[int, ...]]:
        """The bad words of several tokens."""
        return [word for word in self.bad_words if len(word) > 1]

    @cached_property
    def phrase_table(self) -> tuple[np.ndarray, np.ndarray]:
        """``phrases`` as a kernel reads them: their tokens one after the other, and where each ends, int32."""
        ends = np.cumsum([len(phrase) for phrase in self.phrases], dtype=np.int32)
        return np.array([token for phrase in self.phrases for token in phrase], np.int32), ends

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST or self.top_k == 1

    @property
    def mode(self) -> int:
        if not self.greedy:
            return DRAW
        return ARGMAX if self.penalized or self.biases or self.phrases or self.masked else UNUSED

    @cached_property
    def record(self) -> np.ndarray:
        """These parameters as a kernel reads them, :data:`RECORD` ``[1]``."""
        row = np.zeros(1, RECORD)
        row["mode"], row["top_k"], row["top_p"] = self.mode, self.top_k, max(1, int(self.top_p * ONE))
        row["num_bias"], row["penalized"], row["num_phrases"] = len(self.biases), self.penalized, len(self.phrases)
        row["seed"] = np.array([self.seed], "<u8").view("<i4")
        if not self.greedy:
            scale = math.log2(math.e) / self.temperature
            row["scale"] = max(scale, 2**-126)  # no subnormals: devices differ
            row["unscale"] = min(1 / scale, 3e38)
        row["floor"] = math.log2(self.min_p) if self.min_p else -math.inf
        row["repetition"], row["inverse"] = self.repetition_penalty, 1 / self.repetition_penalty
        row["frequency"], row["presence"] = self.frequency_penalty, self.presence_penalty
        return row


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


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


def recent_tokens(prompt: Sequence[int], output: Sequence[int]) -> np.ndarray:
    """A sequence's history for the bad words of several tokens, int32 ``[RECENT]``: the token at position ``p`` is in
    element ``p % RECENT``; -1 before there is one."""
    known = [*prompt[-RECENT:], *output[-RECENT:]][-RECENT:]
    end = len(prompt) + len(output)
    recent = np.full(RECENT, -1, np.int32)
    recent[np.arange(end - len(known), end) % RECENT] = known
    return recent
