# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""What tensor-parallel ranks exchange: partial sums for the residual, and their columns of the logits.

All ranks belong to one process, so each reaches the others' memory through peer-mapped pointers, in two ways:

* **Many rows**: a program tells its namesakes on the other ranks that its own rank's part is written (the kernel before
  it made it), waits until they have said so, and reads theirs (:func:`meet`).
* **Few rows** (:data:`PUSHED_ROWS`), where the way there and back counts: it sends its row into every rank's inbox, in
  words of two fp16 and a number, and waits until words with that number are in its own (:func:`add_pushed`).

Either way all parts are added in rank order, so that every rank gets the same bits. The numbers count a program's
exchanges, on the device, so the kernels can be captured into CUDA graphs; a wait that lasts for seconds gives up and
sets :attr:`Exchange.error`, which the host reads.

Nothing protects a buffer from being written while a peer still reads it but the exchanges themselves: a rank that has
finished one knows that its peers have finished the one before. Hence two buffers for the sums, one for o and one for
down, which alternate, and two for the pieces of the logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.errors import InputError
from llama_engine.kernels import nvrtc
from llama_engine.kernels.common import launch_options
from llama_engine.kernels.gemm import LM_HEAD_ROWS

PROGRAMS = 1 << 15  # that can exchange in one launch: rows of a sum, or rows times chunks of logits
PUSHED_ROWS = 32  # up to so many rows are sent rather than fetched
CHUNK = 4096  # columns of logits that a program copies
_PROGRAMS, _SPINS = tl.constexpr(PROGRAMS), tl.constexpr(1 << 23)


@triton.jit
def meet(signal_ptr, flags_ptr, count_ptr, error_ptr, pid, RANKS: tl.constexpr):
    """Say to this program's namesakes on the other ranks that what they read is there, and wait for theirs.

    ``signal_ptr``: addresses of this rank's flags on each peer; ``flags_ptr``: the peers' flags here, int32
    ``[RANKS - 1, PROGRAMS]``; ``count_ptr``: int32 ``[PROGRAMS + 1]``, exchanges so far, and whether one failed.
    """
    turn = tl.load(count_ptr + pid) + 1
    limit = tl.where(tl.load(count_ptr + _PROGRAMS) == 0, _SPINS, 1)
    for peer in tl.static_range(RANKS - 1):
        there = tl.load(signal_ptr + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(there + pid, turn, sem="release", scope="sys")
    for peer in tl.static_range(RANKS - 1):
        here = flags_ptr + peer * _PROGRAMS + pid
        spins = 1
        while (tl.atomic_add(here, 0, sem="acquire", scope="sys") - turn < 0) & (spins < limit):
            spins += 1
        if spins >= limit:
            tl.store(count_ptr + _PROGRAMS, 1)
            tl.store(error_ptr, 1)
    tl.store(count_ptr + pid, turn)
    tl.debug_barrier()


@triton.jit
def add_parts(x, parts_ptr, offs, mask, RANKS: tl.constexpr):
    """``x`` and, in rank order, every rank's fp16 at ``offs``; ``parts_ptr``: their addresses."""
    for rank in tl.static_range(RANKS):
        part = tl.multiple_of(tl.load(parts_ptr + rank).to(tl.pointer_type(tl.float16)), 16)
        x += tl.load(part + offs, mask=mask, other=0.0, volatile=True).to(tl.float32)
    return x


@triton.jit
def add_pushed(
    x,
    mine_ptr,
    pushes_ptr,
    inbox_ptr,
    count_ptr,
    error_ptr,
    row,
    K,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``x`` ``[BLOCK]`` and, in rank order, every rank's fp16 ``row`` of ``K``, of which this one's is at ``mine_ptr``.

    ``pushes_ptr``: where each rank takes words from this one; ``inbox_ptr``: int64 ``[RANKS, ROWS, K / 2]``, where this
    one does. A word is a pair and, in its upper half, the number of the exchange; it cannot tear.
    """
    turn = tl.load(count_ptr + row) + 1
    limit = tl.where(tl.load(count_ptr + _PROGRAMS) == 0, _SPINS, 1)
    pair = tl.arange(0, BLOCK // 2)
    mask = pair < K // 2
    at = row * (K // 2) + pair
    number = turn.to(tl.int64) << 32
    mine = tl.load(mine_ptr.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
    word = number | (mine.to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(RANKS):
        there = tl.multiple_of(tl.load(pushes_ptr + rank).to(tl.pointer_type(tl.int64)), 16)
        tl.store(there + at, word, mask=mask)
    for rank in tl.static_range(RANKS):
        here = inbox_ptr + rank * (ROWS * (K // 2)) + at
        word = tl.load(here, mask=mask, other=number, volatile=True)
        spins = 1
        while (tl.min(((word >> 32) == turn).to(tl.int32), axis=0) == 0) & (spins < limit):
            word = tl.load(here, mask=mask, other=number, volatile=True)
            spins += 1
        if spins >= limit:
            tl.store(count_ptr + _PROGRAMS, 1)
            tl.store(error_ptr, 1)
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        x += tl.interleave(low, high).to(tl.float32)
    tl.store(count_ptr + row, turn)
    return x


@triton.jit
def _gather_logits(
    parts_ptr,
    signal_ptr,
    flags_ptr,
    count_ptr,
    error_ptr,
    out_ptr,
    best_ptr,
    index_ptr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK  # of a rank
    rank = chunk // chunks
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    meet(signal_ptr, flags_ptr, count_ptr, error_ptr, tl.program_id(0) * (chunks * RANKS) + chunk, RANKS)
    offs = chunk % chunks * BLOCK + tl.arange(0, BLOCK)
    mask = offs < COLUMNS
    part = tl.multiple_of(tl.load(parts_ptr + rank).to(tl.pointer_type(tl.float32)), 16)
    y = tl.load(part + row * COLUMNS + offs, mask=mask, other=0.0, volatile=True)
    first = rank * COLUMNS
    tl.store(out_ptr + row * (COLUMNS * RANKS) + first + offs, y, mask=mask)
    judged = tl.where(y == y, y, float("inf"))  # as the matrix kernel does: a maximum may drop NaN, but not infinity
    best, index = tl.max(tl.where(mask, judged, float("-inf")), axis=0, return_indices=True)
    at = row * (chunks * RANKS) + chunk
    tl.store(best_ptr + at, best)
    tl.store(index_ptr + at, first + chunk % chunks * BLOCK + index)


@dataclass(frozen=True)
class Parts:
    """A buffer of this rank, and where all ranks' lie: int64 addresses ``[ranks]``, in rank order. Of sums also where
    each rank takes words from this one, and where this one does, int64 ``[ranks, PUSHED_ROWS, hidden / 2]``."""

    mine: torch.Tensor
    every: torch.Tensor
    pushes: torch.Tensor | None = None
    inbox: torch.Tensor | None = None


class Exchange:
    """One rank's side. Until :meth:`connect`, and within :meth:`alone`, it takes its own buffers for its peers'."""

    def __init__(self, device: torch.device, rank: int, ranks: int, rows: int, hidden: int, columns: int) -> None:
        """``rows`` of at most so many tokens a pass; ``columns`` of the logits a rank has."""
        self.device, self.rank, self.ranks = device, rank, ranks
        self._columns = columns
        heads = min(LM_HEAD_ROWS, rows)
        if max(rows, heads * -(-columns // CHUNK) * ranks) > PROGRAMS:
            raise InputError(f"{ranks} ranks exchange at most {PROGRAMS} tokens a step: build with less max_num_tokens")
        shapes = [((rows, hidden), torch.float16)] * 2 + [((heads, columns), torch.float32)] * 2
        self._inboxes = [
            torch.zeros((ranks, PUSHED_ROWS, hidden // 2), dtype=torch.int64, device=device) for _ in range(2)
        ]
        self._buffers = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self.flags = torch.zeros((ranks - 1, PROGRAMS), dtype=torch.int32, device=device)
        self.count = torch.zeros(PROGRAMS + 1, dtype=torch.int32, device=device)
        self.error = torch.zeros(1, dtype=torch.int32)
        if device.type == "cuda":
            self.error = self.error.pin_memory()
        own = [[buffer.data_ptr()] * ranks for buffer in self._buffers]
        pushes = [[part.data_ptr() for part in inbox] for inbox in self._inboxes]
        self._alone = self._table(own, pushes, [row.data_ptr() for row in self.flags])
        self._tables, self._connected = self._alone, self._alone

    def _table(self, buffers: list[list[int]], pushes: list[list[int]], signals: list[int]) -> list[torch.Tensor]:
        rows = [*buffers, *pushes, signals]
        return [torch.tensor(row, dtype=torch.int64, device=self.device) for row in rows]

    def connect(self, every: Sequence[Exchange]) -> None:
        """Exchange with ``every`` rank (this one among them) from now on; once, since graphs keep the addresses."""
        peers = [peer for peer in every if peer is not self]
        for peer in peers:
            if peer.device != self.device:
                nvrtc.enable_peer_access(self.device, peer.device)
        buffers = [[rank._buffers[i].data_ptr() for rank in every] for i in range(len(self._buffers))]
        pushes = [[rank._inboxes[i][self.rank].data_ptr() for rank in every] for i in range(2)]
        # on a peer, the row of flags that is this rank's: its ranks but itself, in order
        signals = [peer.flags[self.rank - (peer.rank < self.rank)].data_ptr() for peer in peers]
        self._tables = self._connected = self._table(buffers, pushes, signals)

    def reset(self) -> None:
        """All counts at zero. Every rank must be idle, and reset before any goes on."""
        for counted in (self.flags, self.count, self.error, *self._inboxes):
            counted.zero_()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Exchange with nobody: for compiling and trying kernels, whose results are then wrong."""
        self._tables = self._alone
        try:
            yield
        finally:
            self._tables = self._connected

    def sum(self, name: str) -> Parts:
        """Where the matrix "o" or "down" leaves its partial sums, fp16 ``[rows, hidden]``."""
        i = ("o", "down").index(name)
        return Parts(self._buffers[i], self._tables[i], self._tables[len(self._buffers) + i], self._inboxes[i])

    def logits(self, piece: int) -> Parts:
        """Where lm_head leaves this rank's columns of the logits' ``piece``-th rows, float32 ``[rows, columns]``."""
        i = 2 + piece % 2
        return Parts(self._buffers[i], self._tables[i])

    def arguments(self, parts: Parts) -> tuple[torch.Tensor, ...]:
        """The first arguments of a kernel that calls :func:`meet` and reads ``parts``."""
        return parts.every, self._tables[-1], self.flags, self.count, self.error

    def gather_logits(
        self, parts: Parts, out: torch.Tensor, partials: tuple[torch.Tensor, torch.Tensor], rows: int
    ) -> int:
        """All ranks' ``parts`` side by side into ``out`` float32 ``[rows, ranks * columns]``, and the largest of each
        chunk with its column into ``partials``, of which the number a row is returned."""
        chunks = -(-self._columns // CHUNK) * self.ranks
        _gather_logits[(rows, chunks)](
            *self.arguments(parts),
            out,
            *partials,
            COLUMNS=self._columns,
            RANKS=self.ranks,
            BLOCK=CHUNK,
            num_warps=8,
            **launch_options(self.device),
        )
        return chunks


Added = torch.Tensor | tuple[Exchange, Parts]


def parts_arguments(add: Any, rows: int) -> tuple[torch.Tensor | None, tuple[Any, ...], dict[str, int]]:
    """What ``add`` is to a kernel that adds so many rows of it: the tensor or None, what :func:`add_pushed` and
    :func:`meet` take, and the constants of the exchange."""
    if not isinstance(add, tuple):
        return add, (None,) * 8, {"RANKS": 1, "PUSHED": 0}
    exchange, parts = add
    pushed = PUSHED_ROWS if rows <= PUSHED_ROWS else 0
    taken = parts.mine, parts.pushes, parts.inbox, *exchange.arguments(parts)
    return None, taken, {"RANKS": exchange.ranks, "PUSHED": pushed}
