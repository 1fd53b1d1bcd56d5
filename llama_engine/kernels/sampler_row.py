# ruff: noqa: ANN001, ANN201 (Triton kernels take untyped pointers)
"""How the programs that share a row of logits read their pieces of it, meet, and add up what each found."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def meet(board, SPLIT: tl.constexpr):
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
def posts_of(board, turn, SPLIT: tl.constexpr):
    return board + 8 + (turn & 1) * (8 * SPLIT)


@triton.jit
def posted(posts, column: tl.constexpr, SPLIT: tl.constexpr):
    return tl.load(posts + 8 * tl.arange(0, SPLIT) + column, cache_modifier=".cg")


@triton.jit
def add_up(board, turn, rank, a0, a1, a2, a3, a4, a5, SPLIT: tl.constexpr):
    """Each int64 added up over the row's programs, and the next turn."""
    if SPLIT > 1:
        posts = posts_of(board, turn, SPLIT)
        mine = posts + 8 * rank
        tl.store(mine, a0)
        tl.store(mine + 1, a1)
        tl.store(mine + 2, a2)
        tl.store(mine + 3, a3)
        tl.store(mine + 4, a4)
        tl.store(mine + 5, a5)
        meet(board, SPLIT)
        a0 = tl.sum(posted(posts, 0, SPLIT))
        a1 = tl.sum(posted(posts, 1, SPLIT))
        a2 = tl.sum(posted(posts, 2, SPLIT))
        a3 = tl.sum(posted(posts, 3, SPLIT))
        a4 = tl.sum(posted(posts, 4, SPLIT))
        a5 = tl.sum(posted(posts, 5, SPLIT))
    return a0, a1, a2, a3, a4, a5, turn + 1


@triton.jit
def load_piece(row_ptr, piece, vocab, LANES: tl.constexpr):
    """Ids and logits, one a thread; -inf past the end."""
    ids = piece * LANES + tl.arange(0, LANES)
    return ids, tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def load_tile(row_ptr, chunk, vocab, PARTS: tl.constexpr, LANES: tl.constexpr):
    """A chunk's ids and logits ``[PARTS / 4, 4 * LANES]``, loaded before any is used; a thread has whole columns."""
    ids = (chunk * (PARTS // 4) + tl.arange(0, PARTS // 4)[:, None]) * (4 * LANES) + tl.arange(0, 4 * LANES)[None, :]
    return ids, tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def is_kept(x, ids, end, last):
    """Of the logits from ``end`` on."""
    return (x > end) | (ids <= last)


@triton.jit
def fold(values, LANES: tl.constexpr):
    """A tile's int32 added up by thread, int64 ``[LANES]``; seven weights fit an int32."""
    return tl.sum(tl.reshape(tl.sum(values, axis=0), [LANES, 4]).to(tl.int64), axis=1)
