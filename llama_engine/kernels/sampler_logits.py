# ruff: noqa: ANN001, ANN201 (Triton kernels take untyped pointers)
"""What a request changes in its row of logits before a token is picked: penalties, biases, bad words; in place."""

from __future__ import annotations

import triton
import triton.language as tl

from llama_engine.kernels.sampler_row import load_tile


@triton.jit
def penalize(
    row_ptr,
    counts_ptr,
    repetition,
    inverse,
    frequency,
    presence,
    first,
    stop,
    vocab,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    for chunk in range(first, stop):
        ids, x = load_tile(row_ptr, chunk, vocab, PARTS, LANES)
        count = tl.load(counts_ptr + ids, mask=ids < vocab, other=0).to(tl.int32)
        output = count >> 1
        x = x * tl.where(x > 0, inverse, repetition)
        x = x - frequency * output.to(tl.float32)
        x = x - tl.where(output > 0, presence, 0.0)
        tl.store(row_ptr + ids, x, mask=(count != 0) & (ids < vocab))


@triton.jit
def add_biases(row_ptr, ids_ptr, biases_ptr, num_bias, first, stop, MAX_BIAS: tl.constexpr, WIDTH: tl.constexpr):
    """Those of this program's piece, chunks ``first`` to ``stop`` of WIDTH logits."""
    offs = tl.arange(0, MAX_BIAS)
    ids = tl.load(ids_ptr + offs, mask=offs < num_bias, other=-1)
    mask = (ids >= first * WIDTH) & (ids < stop * WIDTH)
    x = tl.load(row_ptr + ids, mask=mask, other=0.0)
    bias = tl.load(biases_ptr + offs, mask=mask, other=0.0)
    tl.store(row_ptr + ids, x + bias, mask=mask)


@triton.jit
def ban_phrases(
    row_ptr,
    ids_ptr,
    ends_ptr,
    recent_ptr,
    num_phrases,
    position,
    first,
    stop,
    RECENT: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The last token of each phrase whose other tokens stand just before ``position``, if in this program's piece.
    What ``recent`` holds in the place of a position below 0 is -1: a phrase is no longer than RECENT."""
    offs = tl.arange(0, RECENT)[None, :]
    for begin in range(0, num_phrases, TOGETHER):
        phrases = begin + tl.arange(0, TOGETHER)
        there = phrases < num_phrases
        start = tl.load(ends_ptr + phrases - 1, mask=there & (phrases > 0), other=0)
        last = tl.load(ends_ptr + phrases, mask=there, other=1) - 1
        others = (last - start)[:, None]
        inside = there[:, None] & (offs < others)
        wanted = tl.load(ids_ptr + start[:, None] + offs, mask=inside, other=0)
        stands = tl.load(recent_ptr + ((position - others + offs) & (RECENT - 1)), mask=inside, other=0)
        differing = tl.sum((wanted != stands).to(tl.int32), axis=1)
        token = tl.load(ids_ptr + last, mask=there, other=-1)
        mine = there & (token >= first * WIDTH) & (token < stop * WIDTH)
        tl.store(row_ptr + token, float("-inf"), mask=mine & (differing == 0))
