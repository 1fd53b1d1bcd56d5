# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""The kernel of :mod:`llama_engine.kernels.sampler`: the logits changed, then the token, as the slot's record asks."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.kernels.sampler_draw import argmax, locate
from llama_engine.kernels.sampler_logits import add_biases, ban_phrases, penalize
from llama_engine.kernels.sampler_search import search
from llama_engine.kernels.sampler_weights import least_key, random_bits, value_of


@triton.jit
def _real(ptr):
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count_stride"])  # else counts, being narrow, choose the layout of the logits
def sampler_kernel(
    logits_ptr,
    sampled_ptr,
    slots_ptr,
    last_ptr,
    position_ptr,
    records_ptr,
    counts_ptr,
    bias_ids_ptr,
    biases_ptr,
    phrase_ids_ptr,
    phrase_ends_ptr,
    recent_ptr,
    scratch_ptr,
    board_ptr,
    ticket_ptr,
    count_stride,
    vocab,
    WORDS: tl.constexpr,
    MAX_BIAS: tl.constexpr,
    MAX_PHRASE_TOKENS: tl.constexpr,
    RECENT: tl.constexpr,
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
        num_phrases = tl.load(record + 7)
        position = tl.load(position_ptr + slot)
        if penalized != 0:
            count_row = counts_ptr + slot * count_stride
            repetition, inverse = _real(record + 11), _real(record + 12)
            frequency, presence = _real(record + 13), _real(record + 14)
            penalize(row_ptr, count_row, repetition, inverse, frequency, presence, first, stop, vocab, PARTS, LANES)
            tl.debug_barrier()
        if num_bias > 0:
            ids_ptr, values_ptr = bias_ids_ptr + slot * MAX_BIAS, biases_ptr + slot * MAX_BIAS
            add_biases(row_ptr, ids_ptr, values_ptr, num_bias, first, stop, MAX_BIAS, PARTS * LANES)
            tl.debug_barrier()
        if num_phrases > 0:
            ban_phrases(
                row_ptr,
                phrase_ids_ptr + slot * MAX_PHRASE_TOKENS,
                phrase_ends_ptr + slot * (MAX_PHRASE_TOKENS // 2),
                recent_ptr + slot * RECENT,
                num_phrases,
                position,
                first,
                stop,
                RECENT,
                16,
                PARTS * LANES,
            )
            tl.debug_barrier()
        if (penalized != 0) | (num_bias > 0) | (num_phrases > 0):
            token, turn = argmax(row_ptr, board, turn, rank, first, stop, vocab, SPLIT, PARTS, LANES)
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
                    weighty = least_key(largest, scale, -28.0)
                while phase < 2:
                    amount = tl.where(mass, top_p, top_k)
                    if (amount > 0) & (amount < tl.where(mass, 1073741824, vocab)):
                        end, last, turn = search(
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
                    value = value_of(least_key(largest, scale, floor))
                    last = tl.where(value > end, vocab, last)
                    end = tl.maximum(end, value)
                bits = random_bits(tl.load(record + 5), tl.load(record + 6), position)
                token, turn = locate(
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
            if (num_phrases > 0) & (token >= 0):
                tl.store(recent_ptr + slot * RECENT + (position & (RECENT - 1)), token)
