# ruff: noqa: ANN001, ANN201 (Triton kernels take untyped pointers)
"""The token of a row: the largest, or the one at which a running sum passes its target."""

from __future__ import annotations

import triton
import triton.language as tl

from llama_engine.kernels.sampler_row import add_up, is_kept, load_piece, load_tile, posted, posts_of
from llama_engine.kernels.sampler_weights import key_of, weight_of


@triton.jit
def locate(
    row_ptr,
    board,
    turn,
    rank,
    first,
    stop,
    vocab,
    largest,
    scale,
    end,
    last,
    target,
    DRAW: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The first id at which a running sum passes its target, if that is in this program's piece, else -1; the next
    turn. DRAW: of the weights kept by (end, last), past ``target`` * 2**-53 of their sum, and the first program's is
    -2 if a logit is NaN or exceeds the largest; else: of the tokens whose logit is ``end``, past ``target``."""
    WIDTH: tl.constexpr = PARTS * LANES
    chunks = first + tl.arange(0, CHUNKS)
    sums = tl.zeros([CHUNKS], tl.int64)
    most = tl.full([PARTS // 4, 4 * LANES], float("-inf"), tl.float32)
    for chunk in range(first, stop):
        ids, x = load_tile(row_ptr, chunk, vocab, PARTS, LANES)
        if DRAW:
            value = tl.where((x >= end) & is_kept(x, ids, end, last), weight_of(x, largest, scale), 0)
            most = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
        else:
            value = (x == end).to(tl.int32)
        held = tl.sum(value, axis=0).to(tl.int64)
        sums = tl.where(chunks == chunk, tl.sum(held), sums)
    own = tl.sum(sums)
    zero = tl.zeros([], tl.int64)
    broken = zero
    if DRAW:
        broken = tl.sum(tl.sum(((most != most) | (most > largest)).to(tl.int32), axis=0)).to(tl.int64)
    total, broken, _, _, _, _, after = add_up(board, turn, rank, own, broken, zero, zero, zero, zero, SPLIT)
    base = zero
    if SPLIT > 1:
        before = tl.arange(0, SPLIT) < rank
        base = tl.sum(tl.where(before, posted(posts_of(board, turn, SPLIT), 0, SPLIT), 0))
    goal = target
    if DRAW:
        goal = ((target & 8191) * total) >> 13
        goal = (((target >> 13) & 8191) * total + goal) >> 13
        goal = (((target >> 26) & 8191) * total + goal) >> 13
        goal = (((target >> 39) & 8191) * total + goal) >> 13
        goal = ((target >> 52) * total + goal) >> 1
    found = tl.full([], -1, tl.int32)
    if broken > 0:
        found = tl.where(rank == 0, -2, -1).to(tl.int32)
    elif (goal >= base) & (goal < base + own):
        running = tl.cumsum(sums, axis=0) + base
        chunk = first + tl.sum((running <= goal).to(tl.int32))
        base += tl.sum(tl.where(chunks < chunk, sums, 0))
        ids = chunk * WIDTH + tl.arange(0, WIDTH)
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        if DRAW:
            value = tl.where((x >= end) & is_kept(x, ids, end, last), weight_of(x, largest, scale), 0).to(tl.int64)
        else:
            value = (x == end).to(tl.int64)
        found = chunk * WIDTH + tl.sum((tl.cumsum(value, axis=0) + base <= goal).to(tl.int32))
    return found, after


@triton.jit
def argmax(
    row_ptr, board, turn, rank, first, stop, vocab, SPLIT: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr
):
    """The first of the largest, or -1 if that is not finite; the next turn to meet."""
    best = tl.full([LANES], -0x7FFFFFFF, tl.int32)
    where = tl.zeros([LANES], tl.int32)
    for chunk in range(first, stop):
        for part in tl.static_range(PARTS):
            ids, x = load_piece(row_ptr, chunk * PARTS + part, vocab, LANES)
            key = key_of(x)
            where = tl.where(key > best, ids, where)
            best = tl.maximum(best, key)
    top = tl.max(best)
    token = tl.min(tl.where(best == top, where, 0x7FFFFFFF))
    if SPLIT > 1:
        tops, tokens = top.to(tl.int64), token.to(tl.int64)
        add_up(board, turn, rank, tops, tokens, tops, tops, tops, tops, SPLIT)
        tops = posted(posts_of(board, turn, SPLIT), 0, SPLIT)
        tokens = posted(posts_of(board, turn, SPLIT), 1, SPLIT)
        largest = tl.max(tops)
        token = tl.min(tl.where(tops == largest, tokens, 0x7FFFFFFF)).to(tl.int32)
        top = largest.to(tl.int32)
    finite = (top < 0x7F800000) & (top > -0x7F800001)
    return tl.where(finite, token, -1), turn + 1
