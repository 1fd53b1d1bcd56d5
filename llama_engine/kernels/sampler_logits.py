# ruff: noqa: ANN001, ANN201 (Triton kernels take untyped pointers)
"""What a request changes in its row of logits before a token is picked: penalties and biases, in place."""

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
