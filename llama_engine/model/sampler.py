"""The reference of :mod:`llama_engine.sampling` in PyTorch: whole batches, any device, nothing waits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from llama_engine.sampling import DRAW, EXP2, NOT_FINITE, ONE, RECENT, SHIFT, Logprobs, SamplingParams, random_bits


def process(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    counts: torch.Tensor | None,
    recent: np.ndarray | None,
) -> torch.Tensor:
    """Penalties, biases and bad words: float32 ``[rows, vocab]``, a copy. ``counts`` int16 ``[rows, vocab]`` as
    :func:`count_tokens` gives them, None when no row is penalized; ``recent`` int32 ``[rows, RECENT]`` as
    :func:`recent_tokens` does, None when no row has bad words of several tokens."""
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
    for row, (p, position) in enumerate(zip(params, positions)):
        for *others, token in p.phrases:
            before = range(position - len(others), position)
            if others == [recent[row, place % RECENT] for place in before]:
                x[row, token] = -math.inf
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
    recent: np.ndarray | None = None,
) -> torch.Tensor:
    """The reference: one id a row of ``logits`` ``[rows, vocab]``, int64 ``[rows]``, on any device without waiting.
    ``counts`` and ``recent`` as :func:`process` takes them."""
    x = process(logits, params, positions, counts, recent)
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
    return torch.where(torch.isfinite(largest[:, 0]), token, NOT_FINITE)


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
