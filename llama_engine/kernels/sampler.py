# ruff: noqa: ANN001, ANN202 (Triton kernels take untyped pointers)
"""The draw of :mod:`llama_engine.sampling` on a GPU: one program a row, no sort, no wait for the host.

A pass reads the row once, from L2. A row that only has a temperature takes one pass. Where top-k or top-p ends is
searched for among 32-bit keys in the order of the logits: passes that each measure what lies above six keys narrow it
to CANDIDATES tokens, which one more pass gathers and a bisection in registers finishes. Sums are integers, so the
result is the reference's to the bit. Off-switch: greedy decoding, which never launches it.
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
PARTS = 16  # tokens that a thread has under way
WORDS = RECORD.itemsize // 4


@triton.jit
def _key(x):
    """int32 in the order of ``x``; equal for 0 and -0, the largest for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)
    return tl.where(x == x, key, 0x7FFFFFFF)


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
def _above(
    row_ptr, vocab, largest, scale, end, last, mass, p0, p1, p2, p3, p4, p5, PARTS: tl.constexpr, LANES: tl.constexpr
):
    """What lies at or above each logit of p0 .. p5: tokens, or with ``mass`` the weight of those (end, last) keeps."""
    a0 = tl.zeros([4 * LANES], tl.int64)
    a1 = tl.zeros([4 * LANES], tl.int64)
    a2 = tl.zeros([4 * LANES], tl.int64)
    a3 = tl.zeros([4 * LANES], tl.int64)
    a4 = tl.zeros([4 * LANES], tl.int64)
    a5 = tl.zeros([4 * LANES], tl.int64)
    if mass:  # four weights fill an int32
        for chunk in range(0, tl.cdiv(vocab, PARTS * LANES)):
            ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
            weight = tl.where(_kept(x, ids, end, last), _weight(x, largest, scale), 0)
            a0 += tl.sum(tl.where(x >= p0, weight, 0), axis=0)
            a1 += tl.sum(tl.where(x >= p1, weight, 0), axis=0)
            a2 += tl.sum(tl.where(x >= p2, weight, 0), axis=0)
            a3 += tl.sum(tl.where(x >= p3, weight, 0), axis=0)
            a4 += tl.sum(tl.where(x >= p4, weight, 0), axis=0)
            a5 += tl.sum(tl.where(x >= p5, weight, 0), axis=0)
    else:
        for chunk in range(0, tl.cdiv(vocab, PARTS * LANES)):
            ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
            a0 += tl.sum((x >= p0).to(tl.int32), axis=0)
            a1 += tl.sum((x >= p1).to(tl.int32), axis=0)
            a2 += tl.sum((x >= p2).to(tl.int32), axis=0)
            a3 += tl.sum((x >= p3).to(tl.int32), axis=0)
            a4 += tl.sum((x >= p4).to(tl.int32), axis=0)
            a5 += tl.sum((x >= p5).to(tl.int32), axis=0)
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
    vocab,
    end,
    last,
    low,
    high,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The logits in ``low <= x < high`` that (end, last) keeps, in any order; their number. ``high`` may be NaN."""
    count = tl.zeros([], tl.int32)
    for chunk in range(0, tl.cdiv(vocab, PARTS * LANES)):
        held = tl.zeros([LANES], tl.int32)
        for part in tl.static_range(PARTS):
            ids, x = _piece(row_ptr, chunk * PARTS + part, vocab, LANES)
            inside = (x >= low) & ((x >= high) == 0) & _kept(x, ids, end, last)
            held += inside.to(tl.int32)
        found = tl.sum(held)
        if found > 0:
            at = count + tl.cumsum(held, axis=0) - held
            for part in tl.static_range(PARTS):
                ids, x = _piece(row_ptr, chunk * PARTS + part, vocab, LANES)
                inside = (x >= low) & ((x >= high) == 0) & _kept(x, ids, end, last)
                tl.store(scratch_ptr + at, x, mask=inside & (at < CANDIDATES))
                at += inside.to(tl.int32)
            count += found
    return count


@triton.jit
def _locate(
    row_ptr,
    vocab,
    largest,
    scale,
    end,
    last,
    target,
    DRAW: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The first id at which a running sum passes its target. DRAW: of the weights kept by (end, last), past
    ``target`` * 2**-53 of their sum, -1 if a logit is NaN or exceeds the largest; else: of the tokens whose logit is
    ``end``, past ``target``."""
    WIDTH: tl.constexpr = PARTS * LANES
    chunks = tl.arange(0, CHUNKS)
    sums = tl.zeros([CHUNKS], tl.int64)
    most = tl.full([PARTS // 4, 4 * LANES], float("-inf"), tl.float32)
    for chunk in range(0, tl.cdiv(vocab, WIDTH)):
        ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
        if DRAW:
            value = tl.where((x >= end) & _kept(x, ids, end, last), _weight(x, largest, scale), 0)
            most = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
        else:
            value = (x == end).to(tl.int32)
        held = tl.sum(value, axis=0).to(tl.int64)
        sums = tl.where(chunks == chunk, tl.sum(held), sums)
    goal = target
    if DRAW:
        total = tl.sum(sums)
        goal = ((target & 8191) * total) >> 13
        goal = (((target >> 13) & 8191) * total + goal) >> 13
        goal = (((target >> 26) & 8191) * total + goal) >> 13
        goal = (((target >> 39) & 8191) * total + goal) >> 13
        goal = ((target >> 52) * total + goal) >> 1
    running = tl.cumsum(sums, axis=0)
    chunk = tl.sum((running <= goal).to(tl.int32))
    base = tl.sum(tl.where(chunks == chunk, running - sums, 0))
    ids = chunk * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
    if DRAW:
        value = tl.where((x >= end) & _kept(x, ids, end, last), _weight(x, largest, scale), 0).to(tl.int64)
    else:
        value = (x == end).to(tl.int64)
    found = chunk * WIDTH + tl.sum((tl.cumsum(value, axis=0) + base <= goal).to(tl.int32))
    if DRAW:
        broken = (most != most) | (most > largest)
        found = tl.where(tl.sum(tl.sum(broken.to(tl.int32), axis=0)) > 0, -1, found)
    return found


@triton.jit
def _search(
    row_ptr,
    scratch_ptr,
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
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Where the tokens end that reach ``amount``, a number of tokens or with ``mass`` a share of the weight in 2**-30:
    the last logit, and the last id with that logit. ``low``: the key below which no logit has a weight. ``few``: what
    (end, last) keeps fits CANDIDATES."""
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
        first = turn == 0
        p0 = tl.where(first, low, _pivot(turn, 0, largest, 0.0, low, high))
        p1 = _pivot(turn, 1, largest, 2.0 * unscale, low, high)
        p2 = _pivot(turn, 2, largest, 4.5 * unscale, low, high)
        p3 = _pivot(turn, 3, largest, 7.0 * unscale, low, high)
        p4 = _pivot(turn, 4, largest, 10.0 * unscale, low, high)
        p5 = _pivot(turn, 5, largest, 14.0 * unscale, low, high)
        f0, f1, f2, f3, f4, f5 = _above(
            row_ptr,
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
        at_low = tl.where(first, f0, at_low)
        target = tl.where(first & mass, _share(amount, at_low), target)
        restricts = (first == 0) | (at_low > target)
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
            count = _gather(
                row_ptr,
                scratch_ptr,
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
            offs = tl.arange(0, CANDIDATES)
            x = tl.load(scratch_ptr + offs, mask=offs < count, other=float("-inf"))
            tl.debug_barrier()
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
        # The tokens of this logit are alike: so many of them, the lowest ids.
        value = _value(low)
        each = tl.where(mass, tl.maximum(_weight(value, largest, scale), 1), 1).to(tl.int64)
        needed = (target - at_high + each - 1) // each
        last = tl.where(value == end, last, vocab)
        end = value
        if needed * each < at_low - at_high:
            last = _locate(row_ptr, vocab, largest, scale, end, last, needed - 1, False, CHUNKS, PARTS, LANES)
    return end, last


@triton.jit
def _penalize(
    row_ptr, counts_ptr, repetition, inverse, frequency, presence, vocab, PARTS: tl.constexpr, LANES: tl.constexpr
):
    for chunk in range(0, tl.cdiv(vocab, PARTS * LANES)):
        ids, x = _tile(row_ptr, chunk, vocab, PARTS, LANES)
        count = tl.load(counts_ptr + ids, mask=ids < vocab, other=0).to(tl.int32)
        output = count >> 1
        x = x * tl.where(x > 0, inverse, repetition)
        x = x - frequency * output.to(tl.float32)
        x = x - tl.where(output > 0, presence, 0.0)
        tl.store(row_ptr + ids, x, mask=(count != 0) & (ids < vocab))


@triton.jit
def _argmax(row_ptr, vocab, PARTS: tl.constexpr, LANES: tl.constexpr):
    """The first of the largest, or -1 if that is not finite."""
    best = tl.full([LANES], -0x7FFFFFFF, tl.int32)
    where = tl.zeros([LANES], tl.int32)
    for chunk in range(0, tl.cdiv(vocab, PARTS * LANES)):
        for part in tl.static_range(PARTS):
            ids, x = _piece(row_ptr, chunk * PARTS + part, vocab, LANES)
            key = _key(x)
            where = tl.where(key > best, ids, where)
            best = tl.maximum(best, key)
    top = tl.max(best)
    token = tl.min(tl.where(best == top, where, 0x7FFFFFFF))
    finite = (top < 0x7F800000) & (top > -0x7F800001)
    return tl.where(finite, token, -1)


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
    count_stride,
    vocab,
    WORDS: tl.constexpr,
    MAX_BIAS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    record = records_ptr + slot * WORDS
    mode = tl.load(record)
    token = tl.load(sampled_ptr + row)
    if mode != 0:
        row_ptr = logits_ptr + row.to(tl.int64) * vocab
        top_k = tl.load(record + 1)
        top_p = tl.load(record + 2)
        num_bias = tl.load(record + 3)
        penalized = tl.load(record + 4)
        if penalized != 0:
            count_row = counts_ptr + slot * count_stride
            repetition, inverse = _real(record + 11), _real(record + 12)
            frequency, presence = _real(record + 13), _real(record + 14)
            _penalize(row_ptr, count_row, repetition, inverse, frequency, presence, vocab, PARTS, LANES)
            tl.debug_barrier()
        if num_bias > 0:
            offs = tl.arange(0, MAX_BIAS)
            mask = offs < num_bias
            ids = tl.load(bias_ids_ptr + slot * MAX_BIAS + offs, mask=mask, other=0)
            x = tl.load(row_ptr + ids, mask=mask, other=0.0)
            bias = tl.load(biases_ptr + slot * MAX_BIAS + offs, mask=mask, other=0.0)
            tl.store(row_ptr + ids, x + bias, mask=mask)
            tl.debug_barrier()
        if (penalized != 0) | (num_bias > 0):
            token = _argmax(row_ptr, vocab, PARTS, LANES)
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
                        end, last = _search(
                            row_ptr,
                            scratch_ptr + row.to(tl.int64) * CANDIDATES,
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
                token = _locate(row_ptr, vocab, largest, scale, end, last, bits, True, CHUNKS, PARTS, LANES)
            else:
                token = -1
        tl.store(sampled_ptr + row, token)
        tl.store(last_ptr + slot, tl.maximum(token, 0))  # a step that is on its way reads it
        if (penalized != 0) & (token >= 0):
            at = counts_ptr + slot * count_stride + token
            count = tl.load(at)
            tl.store(at, tl.where(count < 32766, count + 2, count).to(tl.int16))


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
        _sampler[(num_rows,)](
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
            self.counts.stride(0),
            self.vocab_size,
            WORDS=WORDS,
            MAX_BIAS=MAX_BIAS,
            CHUNKS=triton.next_power_of_2(triton.cdiv(self.vocab_size, PARTS * 32 * WARPS)),
            PARTS=PARTS,
            LANES=32 * WARPS,
            CANDIDATES=CANDIDATES,
            num_warps=WARPS,
            enable_fp_fusion=False,  # a product and a sum round by themselves, as the reference's do
            **launch_options(logits.device),
        )
