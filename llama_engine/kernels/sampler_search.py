# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""Where the tokens end that top-k or top-p keeps: a search among keys, no sort."""

from __future__ import annotations

import triton
import triton.language as tl

from llama_engine.kernels.sampler_draw import locate
from llama_engine.kernels.sampler_row import add_up, fold, is_kept, load_piece, load_tile, meet
from llama_engine.kernels.sampler_weights import key_of, share_of, value_of, weight_of


@triton.jit
def _above(
    row_ptr,
    first,
    stop,
    vocab,
    largest,
    scale,
    end,
    last,
    mass,
    p0,
    p1,
    p2,
    p3,
    p4,
    p5,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """What lies at or above each logit of p0 .. p5: tokens, or with ``mass`` the weight of those (end, last) keeps."""
    a0 = tl.zeros([LANES], tl.int64)
    a1 = tl.zeros([LANES], tl.int64)
    a2 = tl.zeros([LANES], tl.int64)
    a3 = tl.zeros([LANES], tl.int64)
    a4 = tl.zeros([LANES], tl.int64)
    a5 = tl.zeros([LANES], tl.int64)
    if mass:
        for chunk in range(first, stop):
            ids, x = load_tile(row_ptr, chunk, vocab, PARTS, LANES)
            weight = tl.where(is_kept(x, ids, end, last), weight_of(x, largest, scale), 0)
            a0 += fold(tl.where(x >= p0, weight, 0), LANES)
            a1 += fold(tl.where(x >= p1, weight, 0), LANES)
            a2 += fold(tl.where(x >= p2, weight, 0), LANES)
            a3 += fold(tl.where(x >= p3, weight, 0), LANES)
            a4 += fold(tl.where(x >= p4, weight, 0), LANES)
            a5 += fold(tl.where(x >= p5, weight, 0), LANES)
    else:
        for chunk in range(first, stop):
            ids, x = load_tile(row_ptr, chunk, vocab, PARTS, LANES)
            a0 += fold((x >= p0).to(tl.int32), LANES)
            a1 += fold((x >= p1).to(tl.int32), LANES)
            a2 += fold((x >= p2).to(tl.int32), LANES)
            a3 += fold((x >= p3).to(tl.int32), LANES)
            a4 += fold((x >= p4).to(tl.int32), LANES)
            a5 += fold((x >= p5).to(tl.int32), LANES)
    return tl.sum(a0), tl.sum(a1), tl.sum(a2), tl.sum(a3), tl.sum(a4), tl.sum(a5)


@triton.jit
def _pivot(turn, j: tl.constexpr, largest, distance, low, high):
    """The j-th of six keys: first ``distance`` below the largest logit, then even in logits, in the end in keys."""
    bottom = value_of(low)
    value = bottom + (value_of(high) - bottom) * ((j + 1) / 7)
    value = tl.where(turn == 0, largest - distance, value)
    key = tl.where(turn < 4, key_of(value).to(tl.int64), low + (high - low) * (j + 1) // 7)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def _tighter(low, high, at_low, at_high, key, found, target):
    """The narrower of brackets: at least ``target`` lies at or above ``low``, less at or above ``high``."""
    up = (found >= target) & (key > low)
    down = (found < target) & (key < high)
    at_low = tl.where(up, found, at_low)
    at_high = tl.where(down, found, at_high)
    return tl.where(up, key, low), tl.where(down, key, high), at_low, at_high


@triton.jit
def _gather(
    row_ptr,
    scratch_ptr,
    board,
    first,
    stop,
    vocab,
    end,
    last,
    low,
    high,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The logits in ``low <= x < high`` that (end, last) keeps, in any order; the board counts. ``high`` may be NaN."""
    for chunk in range(first, stop):
        held = tl.zeros([LANES], tl.int32)
        for part in tl.static_range(PARTS):
            ids, x = load_piece(row_ptr, chunk * PARTS + part, vocab, LANES)
            inside = (x >= low) & ((x >= high) == 0) & is_kept(x, ids, end, last)
            held += inside.to(tl.int32)
        found = tl.sum(held)
        if found > 0:
            at = tl.atomic_add(board + 1, found.to(tl.int64), sem="relaxed") + tl.cumsum(held, axis=0) - held
            for part in tl.static_range(PARTS):
                ids, x = load_piece(row_ptr, chunk * PARTS + part, vocab, LANES)
                inside = (x >= low) & ((x >= high) == 0) & is_kept(x, ids, end, last)
                tl.store(scratch_ptr + at, x, mask=inside & (at < CANDIDATES))
                at += inside.to(tl.int32)


@triton.jit
def search(
    row_ptr,
    scratch_ptr,
    board,
    meeting,
    rank,
    first,
    stop,
    vocab,
    largest,
    scale,
    unscale,
    low,
    end,
    last,
    amount,
    mass,
    few,
    SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Where the tokens end that reach ``amount``, a number of tokens or with ``mass`` a share of the weight in 2**-30:
    the last logit, the last id with that logit, and the next turn to meet. ``low``: the key below which no logit has a
    weight. ``few``: what (end, last) keeps fits CANDIDATES."""
    # Between two keys: what lies at or above low reaches the target, what lies at or above high does not.
    high = key_of(largest).to(tl.int64) + 2
    low = tl.maximum(low, key_of(end).to(tl.int64))
    at_high = tl.zeros([], tl.int64)
    at_low = tl.zeros([], tl.int64)
    target = amount.to(tl.int64)
    fits = few
    restricts = at_low == 0
    turn = tl.zeros([], tl.int32)
    while restricts & (fits == 0) & (high - low > 1):
        start = turn == 0
        p0 = tl.where(start, low, _pivot(turn, 0, largest, 0.0, low, high))
        p1 = _pivot(turn, 1, largest, 2.0 * unscale, low, high)
        p2 = _pivot(turn, 2, largest, 4.5 * unscale, low, high)
        p3 = _pivot(turn, 3, largest, 7.0 * unscale, low, high)
        p4 = _pivot(turn, 4, largest, 10.0 * unscale, low, high)
        p5 = _pivot(turn, 5, largest, 14.0 * unscale, low, high)
        f0, f1, f2, f3, f4, f5 = _above(
            row_ptr,
            first,
            stop,
            vocab,
            largest,
            scale,
            end,
            last,
            mass,
            value_of(p0),
            value_of(p1),
            value_of(p2),
            value_of(p3),
            value_of(p4),
            value_of(p5),
            PARTS,
            LANES,
        )
        f0, f1, f2, f3, f4, f5, meeting = add_up(board, meeting, rank, f0, f1, f2, f3, f4, f5, SPLIT)
        at_low = tl.where(start, f0, at_low)
        target = tl.where(start & mass, share_of(amount, at_low), target)
        restricts = (start == 0) | (at_low > target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p0, f0, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p1, f1, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p2, f2, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p3, f3, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p4, f4, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p5, f5, target)
        least = weight_of(value_of(low), largest, scale).to(tl.int64)
        least = tl.where(mass, least - (least >> 20) - 1, 1)  # a larger logit's may be smaller by a rounding
        fits = (at_low - at_high) // tl.maximum(least, 1) <= CANDIDATES
        turn += 1
    if restricts:
        if fits:
            _gather(
                row_ptr,
                scratch_ptr,
                board,
                first,
                stop,
                vocab,
                end,
                last,
                value_of(low),
                value_of(high),
                PARTS,
                LANES,
                CANDIDATES,
            )
            tl.debug_barrier()
            meet(board, SPLIT)
            if rank == 0:
                offs = tl.arange(0, CANDIDATES)
                count = tl.load(board + 1, cache_modifier=".cg")
                x = tl.load(scratch_ptr + offs, mask=offs < count, other=float("-inf"), cache_modifier=".cg")
                tl.debug_barrier()
                tl.store(board + 1, 0)
                measure = (offs < count).to(tl.int32)
                if mass:
                    measure = tl.where(offs < count, weight_of(x, largest, scale), 0)
                if few & mass:
                    target = share_of(amount, tl.sum(measure.to(tl.int64)))
                beyond = at_high
                while high - low > 1:
                    middle = low + (high - low) // 2
                    found = beyond + tl.sum(tl.where(x >= value_of(middle), measure, 0).to(tl.int64))
                    enough = found >= target
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                    at_high = tl.where(enough, at_high, found)
                at_low = at_high + tl.sum(tl.where(x == value_of(low), measure, 0).to(tl.int64))
            else:  # the sum is what the first program found
                low = tl.zeros([], tl.int64)
                target = tl.zeros([], tl.int64)
                at_high = tl.zeros([], tl.int64)
                at_low = tl.zeros([], tl.int64)
            low, target, at_high, at_low, _, _, meeting = add_up(
                board, meeting, rank, low, target, at_high, at_low, at_low, at_low, SPLIT
            )
        # The tokens of this logit are alike: so many of them, the lowest ids.
        value = value_of(low)
        each = tl.where(mass, tl.maximum(weight_of(value, largest, scale), 1), 1).to(tl.int64)
        needed = (target - at_high + each - 1) // each
        last = tl.where(value == end, last, vocab)
        end = value
        if needed * each < at_low - at_high:
            at, meeting = locate(
                row_ptr,
                board,
                meeting,
                rank,
                first,
                stop,
                vocab,
                largest,
                scale,
                end,
                last,
                needed - 1,
                False,
                SPLIT,
                CHUNKS,
                PARTS,
                LANES,
            )
            here = tl.maximum(at, 0).to(tl.int64)  # in one program, 0 in the others
            here, _, _, _, _, _, meeting = add_up(board, meeting, rank, here, here, here, here, here, here, SPLIT)
            last = here.to(tl.int32)
    return end, last, meeting
