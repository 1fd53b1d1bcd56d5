# ruff: noqa: ANN001, ANN202 (Triton kernels take untyped pointers)
"""The draw of :mod:`llama_engine.sampling` on a GPU: one launch, no sort, no wait for the host.

A row is cut into SPLIT pieces, each a program's. They meet after every pass over the row, from L2, to add up what each
found; sums are integers, so the result is the reference's to the bit however the row is cut. A row that only has a
temperature takes one pass. Where top-k or top-p ends is searched for among 32-bit keys in the order of the logits:
passes that each measure what lies above six keys narrow it to CANDIDATES tokens, which one more pass gathers and one
program finishes by bisection in registers. Off-switch: greedy decoding, which never launches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.kernels.common import launch_options
from llama_engine.sampling import MAX_BIAS, RECORD, SamplingParams, count_tokens

CANDIDATES = 8192  # what a program's registers hold
WARPS = 16
PARTS = 8  # tokens that a thread has under way
WORDS = RECORD.itemsize // 4
MAX_SPLIT = 32
SPLITS: int | None = None  # programs a row, if not what programs_per_row says
BOARD = 8 + 2 * 8 * MAX_SPLIT  # int64 a row: arrivals, candidates, 6 unused, then 8 a program for even and odd meetings


@triton.jit
def _key(x):
    """int32 in the order of ``x``; equal for 0 and -0, the largest for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def _meet(board, SPLIT: tl.constexpr):
    """Wait for the other programs of the row; each then sees what the others wrote before. A meeting adds 32 in all,
    whatever SPLIT, so nothing needs a reset."""
    if SPLIT > 1:
        tl.debug_barrier()
        before = tl.atomic_add(board, 32 // SPLIT, sem="acq_rel")
        arrived = before + 32 // SPLIT
        while arrived < (before // 32 + 1) * 32:
            arrived = tl.atomic_add(board, 0, sem="acquire")
        tl.debug_barrier()


@triton.jit
def _posts(board, turn, SPLIT: tl.constexpr):
    return board + 8 + (turn & 1) * (8 * SPLIT)


@triton.jit
def _posted(posts, column: tl.constexpr, SPLIT: tl.constexpr):
    return tl.load(posts + 8 * tl.arange(0, SPLIT) + column, cache_modifier=".cg")


@triton.jit
def _sums(board, turn, rank, a0, a1, a2, a3, a4, a5, SPLIT: tl.constexpr):
    """Each int64 added up over the row's programs, and the next turn."""
    if SPLIT > 1:
        posts = _posts(board, turn, SPLIT)
        mine = posts + 8 * rank
        tl.store(mine, a0)
        tl.store(mine + 1, a1)
        tl.store(mine + 2, a2)
        tl.store(mine + 3, a3)
        tl.store(mine + 4, a4)
        tl.store(mine + 5, a5)
        _meet(board, SPLIT)
        a0 = tl.sum(_posted(posts, 0, SPLIT))
        a1 = tl.sum(_posted(posts, 1, SPLIT))
        a2 = tl.sum(_posted(posts, 2, SPLIT))
        a3 = tl.sum(_posted(posts, 3, SPLIT))
        a4 = tl.sum(_posted(posts, 4, SPLIT))
        a5 = tl.sum(_posted(posts, 5, SPLIT))
    return a0, a1, a2, a3, a4, a5, turn + 1


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, largest, scale):
    """sampling.weights, int32; nonsense for NaN."""
    t = tl.maximum((x - largest) * scale, -40.0)
    shifted = t + 12582940.0
    f = t - (shifted - 12582940.0)
    p = f * 0.0013264723820611835
    p = (p + 0.009671512991189957) * f
    p = (p + 0.05550733581185341) * f
    p = (p + 0.24022242426872253) * f
    p = (p + 0.6931470036506653) * f
    p = p + 1.0
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int32)


@triton.jit
def _least(largest, scale, floor):
    """The key, int64, of the smallest logit with t >= ``floor``."""
    above = _key(largest).to(tl.int64)
    below = tl.full([], -0x7F800001, tl.int64)  # -inf
    while above - below > 1:
        middle = below + (above - below) // 2
        enough = (_value(middle) - largest) * scale >= floor
        above = tl.where(enough, middle, above)
        below = tl.where(enough, below, middle)
    return above


@triton.jit
def _piece(row_ptr, piece, vocab, LANES: tl.constexpr):
    """Ids and logits, one a thread; -inf past the end."""
    ids = piece * LANES + tl.arange(0, LANES)
    return ids, tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def _tile(row_ptr, chunk, vocab, PARTS: tl.constexpr, LANES: tl.constexpr):
    """A chunk's ids and logits ``[PARTS / 4, 4 * LANES]``, loaded before any is used; a thread has whole columns."""
    ids = (chunk * (PARTS // 4) + tl.arange(0, PARTS // 4)[:, None]) * (4 * LANES) + tl.arange(0, 4 * LANES)[None, :]
    return ids, tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def _kept(x, ids, end, last):
    """Of the logits from ``end`` on."""
    return (x > end) | (ids <= last)


@triton.jit
def _fold(values, LANES: tl.constexpr):
    """A tile's int32 added up by thread, int64 ``[LANES]``; seven weights fit an int32."""
    return tl.sum(tl.reshape(tl.sum(values, axis=0), [LANES, 4]).to(tl.int64), axis=1)


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
            ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
            weight = tl.where(_kept(x, ids, end, last), _weight(x, largest, scale), 0)
            a0 += _fold(tl.where(x >= p0, weight, 0), LANES)
            a1 += _fold(tl.where(x >= p1, weight, 0), LANES)
            a2 += _fold(tl.where(x >= p2, weight, 0), LANES)
            a3 += _fold(tl.where(x >= p3, weight, 0), LANES)
            a4 += _fold(tl.where(x >= p4, weight, 0), LANES)
            a5 += _fold(tl.where(x >= p5, weight, 0), LANES)
    else:
        for chunk in range(first, stop):
            ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
            a0 += _fold((x >= p0).to(tl.int32), LANES)
            a1 += _fold((x >= p1).to(tl.int32), LANES)
            a2 += _fold((x >= p2).to(tl.int32), LANES)
            a3 += _fold((x >= p3).to(tl.int32), LANES)
            a4 += _fold((x >= p4).to(tl.int32), LANES)
            a5 += _fold((x >= p5).to(tl.int32), LANES)
    return tl.sum(a0), tl.sum(a1), tl.sum(a2), tl.sum(a3), tl.sum(a4), tl.sum(a5)


@triton.jit
def _pivot(turn, j: tl.constexpr, largest, distance, low, high):
    """The j-th of six keys: first ``distance`` below the largest logit, then even in logits, in the end in keys."""
    bottom = _value(low)
    value = bottom + (_value(high) - bottom) * ((j + 1) / 7)
    value = tl.where(turn == 0, largest - distance, value)
    key = tl.where(turn < 4, _key(value).to(tl.int64), low + (high - low) * (j + 1) // 7)
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
def _share(amount, total):
    """``amount`` * ``total`` * 2**-30, rounded up, within 64 bits."""
    share = amount.to(tl.int64)
    low = share * (total & 0xFFFFFF) + 0x3FFFFFFF
    return (share * (total >> 24) + (low >> 24)) >> 6


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
            ids, x = _piece(row_ptr, chunk * PARTS + part, vocab, LANES)
            inside = (x >= low) & ((x >= high) == 0) & _kept(x, ids, end, last)
            held += inside.to(tl.int32)
        found = tl.sum(held)
        if found > 0:
            at = tl.atomic_add(board + 1, found.to(tl.int64), sem="relaxed") + tl.cumsum(held, axis=0) - held
            for part in tl.static_range(PARTS):
                ids, x = _piece(row_ptr, chunk * PARTS + part, vocab, LANES)
                inside = (x >= low) & ((x >= high) == 0) & _kept(x, ids, end, last)
                tl.store(scratch_ptr + at, x, mask=inside & (at < CANDIDATES))
                at += inside.to(tl.int32)


@triton.jit
def _locate(
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
        ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
        if DRAW:
            value = tl.where((x >= end) & _kept(x, ids, end, last), _weight(x, largest, scale), 0)
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
    total, broken, _, _, _, _, after = _sums(board, turn, rank, own, broken, zero, zero, zero, zero, SPLIT)
    base = zero
    if SPLIT > 1:
        before = tl.arange(0, SPLIT) < rank
        base = tl.sum(tl.where(before, _posted(_posts(board, turn, SPLIT), 0, SPLIT), 0))
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
            value = tl.where((x >= end) & _kept(x, ids, end, last), _weight(x, largest, scale), 0).to(tl.int64)
        else:
            value = (x == end).to(tl.int64)
        found = chunk * WIDTH + tl.sum((tl.cumsum(value, axis=0) + base <= goal).to(tl.int32))
    return found, after


@triton.jit
def _search(
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
    high = _key(largest).to(tl.int64) + 2
    low = tl.maximum(low, _key(end).to(tl.int64))
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
            _value(p0),
            _value(p1),
            _value(p2),
            _value(p3),
            _value(p4),
            _value(p5),
            PARTS,
            LANES,
        )
        f0, f1, f2, f3, f4, f5, meeting = _sums(board, meeting, rank, f0, f1, f2, f3, f4, f5, SPLIT)
        at_low = tl.where(start, f0, at_low)
        target = tl.where(start & mass, _share(amount, at_low), target)
        restricts = (start == 0) | (at_low > target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p0, f0, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p1, f1, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p2, f2, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p3, f3, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p4, f4, target)
        low, high, at_low, at_high = _tighter(low, high, at_low, at_high, p5, f5, target)
        least = _weight(_value(low), largest, scale).to(tl.int64)
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
                _value(low),
                _value(high),
                PARTS,
                LANES,
                CANDIDATES,
            )
            tl.debug_barrier()
            _meet(board, SPLIT)
            if rank == 0:
                offs = tl.arange(0, CANDIDATES)
                count = tl.load(board + 1, cache_modifier=".cg")
                x = tl.load(scratch_ptr + offs, mask=offs < count, other=float("-inf"), cache_modifier=".cg")
                tl.debug_barrier()
                tl.store(board + 1, 0)
                measure = (offs < count).to(tl.int32)
                if mass:
                    measure = tl.where(offs < count, _weight(x, largest, scale), 0)
                if few & mass:
                    target = _share(amount, tl.sum(measure.to(tl.int64)))
                beyond = at_high
                while high - low > 1:
                    middle = low + (high - low) // 2
                    found = beyond + tl.sum(tl.where(x >= _value(middle), measure, 0).to(tl.int64))
                    enough = found >= target
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                    at_high = tl.where(enough, at_high, found)
                at_low = at_high + tl.sum(tl.where(x == _value(low), measure, 0).to(tl.int64))
            else:  # the sum is what the first program found
                low = tl.zeros([], tl.int64)
                target = tl.zeros([], tl.int64)
                at_high = tl.zeros([], tl.int64)
                at_low = tl.zeros([], tl.int64)
            low, target, at_high, at_low, _, _, meeting = _sums(
                board, meeting, rank, low, target, at_high, at_low, at_low, at_low, SPLIT
            )
        # The tokens of this logit are alike: so many of them, the lowest ids.
        value = _value(low)
        each = tl.where(mass, tl.maximum(_weight(value, largest, scale), 1), 1).to(tl.int64)
        needed = (target - at_high + each - 1) // each
        last = tl.where(value == end, last, vocab)
        end = value
        if needed * each < at_low - at_high:
            at, meeting = _locate(
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
            here, _, _, _, _, _, meeting = _sums(board, meeting, rank, here, here, here, here, here, here, SPLIT)
            last = here.to(tl.int32)
    return end, last, meeting


@triton.jit
def _penalize(
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
        ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
        count = tl.load(counts_ptr + ids, mask=ids < vocab, other=0).to(tl.int32)
        output = count >> 1
        x = x * tl.where(x > 0, inverse, repetition)
        x = x - frequency * output.to(tl.float32)
        x = x - tl.where(output > 0, presence, 0.0)
        tl.store(row_ptr + ids, x, mask=(count != 0) & (ids < vocab))


@triton.jit
def _argmax(
    row_ptr, board, turn, rank, first, stop, vocab, SPLIT: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr
):
    """The first of the largest, or -1 if that is not finite; the next turn to meet."""
    best = tl.full([LANES], -0x7FFFFFFF, tl.int32)
    where = tl.zeros([LANES], tl.int32)
    for chunk in range(first, stop):
        for part in tl.static_range(PARTS):
            ids, x = _piece(row_ptr, chunk * PARTS + part, vocab, LANES)
            key = _key(x)
            where = tl.where(key > best, ids, where)
            best = tl.maximum(best, key)
    top = tl.max(best)
    token = tl.min(tl.where(best == top, where, 0x7FFFFFFF))
    if SPLIT > 1:
        tops, tokens = top.to(tl.int64), token.to(tl.int64)
        _sums(board, turn, rank, tops, tokens, tops, tops, tops, tops, SPLIT)
        tops = _posted(_posts(board, turn, SPLIT), 0, SPLIT)
        tokens = _posted(_posts(board, turn, SPLIT), 1, SPLIT)
        largest = tl.max(tops)
        token = tl.min(tl.where(tops == largest, tokens, 0x7FFFFFFF)).to(tl.int32)
        top = largest.to(tl.int32)
    finite = (top < 0x7F800000) & (top > -0x7F800001)
    return tl.where(finite, token, -1), turn + 1


@triton.jit
def _random_bits(low, high, position):
    """sampling.random_bits, int64."""
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    x = seed.to(tl.uint64) + (position.to(tl.int64) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11).to(tl.int64)


@triton.jit
def _real(ptr):
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count_stride"])  # else counts, being narrow, choose the layout of the logits
def _sampler(
    logits_ptr,
    sampled_ptr,
    slots_ptr,
    last_ptr,
    position_ptr,
    records_ptr,
    counts_ptr,
    bias_ids_ptr,
    biases_ptr,
    scratch_ptr,
    board_ptr,
    ticket_ptr,
    count_stride,
    vocab,
    WORDS: tl.constexpr,
    MAX_BIAS: tl.constexpr,
    BOARD: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if SPLIT > 1:  # in the order in which they start: whoever waits, waits for programs that run or are next to
        program = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
        if program == tl.num_programs(0) - 1:
            tl.store(ticket_ptr, 0)
    row, rank = program // SPLIT, program % SPLIT
    slot = tl.load(slots_ptr + row).to(tl.int64)
    record = records_ptr + slot * WORDS
    mode = tl.load(record)
    token = tl.load(sampled_ptr + row)
    if mode != 0:
        row_ptr = logits_ptr + row.to(tl.int64) * vocab
        board = board_ptr + row * BOARD
        turn = tl.zeros([], tl.int32)  # meetings so far
        first = rank * CHUNKS
        stop = tl.minimum(first + CHUNKS, tl.cdiv(vocab, PARTS * LANES))
        top_k = tl.load(record + 1)
        top_p = tl.load(record + 2)
        num_bias = tl.load(record + 3)
        penalized = tl.load(record + 4)
        if penalized != 0:
            count_row = counts_ptr + slot * count_stride
            repetition, inverse = _real(record + 11), _real(record + 12)
            frequency, presence = _real(record + 13), _real(record + 14)
            _penalize(row_ptr, count_row, repetition, inverse, frequency, presence, first, stop, vocab, PARTS, LANES)
            tl.debug_barrier()
        if num_bias > 0:
            offs = tl.arange(0, MAX_BIAS)
            ids = tl.load(bias_ids_ptr + slot * MAX_BIAS + offs, mask=offs < num_bias, other=-1)
            mask = (ids >= first * (PARTS * LANES)) & (ids < stop * (PARTS * LANES))
            x = tl.load(row_ptr + ids, mask=mask, other=0.0)
            bias = tl.load(biases_ptr + slot * MAX_BIAS + offs, mask=mask, other=0.0)
            tl.store(row_ptr + ids, x + bias, mask=mask)
            tl.debug_barrier()
        if (penalized != 0) | (num_bias > 0):
            token, turn = _argmax(row_ptr, board, turn, rank, first, stop, vocab, SPLIT, PARTS, LANES)
        mine = rank == 0  # whether this program says what the token is
        if (mode == 2) & (token >= 0):
            largest = tl.load(row_ptr + token)
            if tl.abs(largest) < float("inf"):
                scale, unscale, floor = _real(record + 8), _real(record + 9), _real(record + 10)
                end = largest - float("inf")
                last = tl.zeros([], tl.int32) + vocab
                few = vocab <= CANDIDATES
                mass = top_k < 0  # false; top-k first, then top-p
                phase = tl.zeros([], tl.int32)
                weighty = tl.zeros([], tl.int64)
                if (top_k > 0) | (top_p < 1073741824):
                    weighty = _least(largest, scale, -28.0)
                while phase < 2:
                    amount = tl.where(mass, top_p, top_k)
                    if (amount > 0) & (amount < tl.where(mass, 1073741824, vocab)):
                        end, last, turn = _search(
                            row_ptr,
                            scratch_ptr + row.to(tl.int64) * CANDIDATES,
                            board,
                            turn,
                            rank,
                            first,
                            stop,
                            vocab,
                            largest,
                            scale,
                            unscale,
                            weighty,
                            end,
                            last,
                            amount,
                            mass,
                            few,
                            SPLIT,
                            CHUNKS,
                            PARTS,
                            LANES,
                            CANDIDATES,
                        )
                        few = few | (amount <= CANDIDATES)
                    mass = top_k >= 0
                    phase += 1
                if floor > -40.0:  # min_p: a logit too
                    value = _value(_least(largest, scale, floor))
                    last = tl.where(value > end, vocab, last)
                    end = tl.maximum(end, value)
                bits = _random_bits(tl.load(record + 5), tl.load(record + 6), tl.load(position_ptr + slot))
                token, turn = _locate(
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
                    bits,
                    True,
                    SPLIT,
                    CHUNKS,
                    PARTS,
                    LANES,
                )
                mine = token != -1
                token = tl.maximum(token, -1)
            else:
                token = -1
        if mine:
            tl.store(sampled_ptr + row, token)
            tl.store(last_ptr + slot, tl.maximum(token, 0))  # a step that is on its way reads it
            if (penalized != 0) & (token >= 0):
                at = counts_ptr + slot * count_stride + token
                count = tl.load(at)
                tl.store(at, tl.where(count < 32766, count + 2, count).to(tl.int16))


def programs_per_row(rows: int, chunks: int, device: torch.device) -> int:
    """SPLIT: 1 in Triton's interpreter, where programs run one after another, else as many as run at once."""
    if device.type != "cuda":
        return 1
    if SPLITS:
        return SPLITS
    split = min(MAX_SPLIT, triton.next_power_of_2(chunks))
    at_once = torch.cuda.get_device_properties(device).multi_processor_count * 16 // WARPS
    while split > 2 and split * rows > at_once:
        split //= 2
    return split


class Sampler:
    """What the slots of an engine ask for, and the kernel over it. The last slot is the padding's and asks for nothing.

    ``records`` int32 ``[slots + 1, 16]`` as :data:`llama_engine.sampling.RECORD`, ``counts`` int16
    ``[slots + 1, vocab]`` as :func:`llama_engine.sampling.count_tokens`, ``bias_ids`` int32 and ``biases`` float32
    ``[slots + 1, MAX_BIAS]``.
    """

    def __init__(self, slots: int, max_rows: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.records = zeros(slots + 1, WORDS)
        self.counts = zeros(slots + 1, vocab_size, dtype=torch.int16)
        self.bias_ids = zeros(slots + 1, MAX_BIAS)
        self.biases = zeros(slots + 1, MAX_BIAS, dtype=torch.float32)
        self._boards = zeros(max_rows, BOARD, dtype=torch.int64)
        self._ticket = zeros(1)
        self._candidates = zeros(max_rows, CANDIDATES, dtype=torch.float32)

    def updates(
        self, slot: int, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
    ) -> list[tuple[torch.Tensor, np.ndarray]]:
        """What binding ``slot`` writes, and where to the front of. The history matters to penalties alone."""
        writes = [(self.records[slot], params.record.view(np.int32))]
        if params.mode and params.penalized:
            writes.append((self.counts[slot], count_tokens(prompt, output, self.vocab_size)))
        if params.mode and params.biases:
            writes.append((self.bias_ids[slot], np.array(list(params.biases), np.int32)))
            writes.append((self.biases[slot], np.array(list(params.biases.values()), np.float32)))
        return writes

    def launch(
        self,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        slots: torch.Tensor,
        last_token: torch.Tensor,
        position: torch.Tensor,
        num_rows: int,
    ) -> None:
        """Replace the tokens of the rows whose slots ask for it.

        ``logits`` float32 ``[rows, vocab]``, overwritten where penalized or biased; ``sampled`` int32 ``[rows]`` holds
        each row's greedy token (:func:`llama_engine.kernels.greedy.greedy`, which ran before) and receives the drawn
        one, or -1 for a row without a finite largest logit; so does ``last_token[slots[r]]`` int32, 0 for such a row.
        ``position[slots[r]]`` int32 is where the new token will stand: as ``greedy`` leaves it.
        """
        chunks = triton.cdiv(self.vocab_size, PARTS * 32 * WARPS)
        split = programs_per_row(num_rows, chunks, logits.device)
        _sampler[(num_rows * split,)](
            logits,
            sampled,
            slots,
            last_token,
            position,
            self.records,
            self.counts,
            self.bias_ids,
            self.biases,
            self._candidates,
            self._boards,
            self._ticket,
            self.counts.stride(0),
            self.vocab_size,
            WORDS=WORDS,
            MAX_BIAS=MAX_BIAS,
            BOARD=BOARD,
            SPLIT=split,
            CHUNKS=triton.next_power_of_2(triton.cdiv(chunks, split)),
            PARTS=PARTS,
            LANES=32 * WARPS,
            CANDIDATES=CANDIDATES,
            num_warps=WARPS,
            enable_fp_fusion=False,  # a product and a sum round by themselves, as the reference's do
            **({} if WARPS == 16 else {"maxnreg": 128}),  # 16 warps a multiprocessor
            **launch_options(logits.device),
        )
