"""The draw of :mod:`llama_engine.sampling` on a GPU: one launch, no sort, no wait for the host.

A row is cut into SPLIT pieces, each a program's. They meet after every pass over the row, from L2, to add up what each
found; sums are integers, so the result is the reference's to the bit however the row is cut. A row that only has a
temperature takes one pass. Where top-k or top-p ends is searched for among 32-bit keys in the order of the logits:
passes that each measure what lies above six keys narrow it to CANDIDATES tokens, which one more pass gathers and one
program finishes by bisection in registers. Off-switch: greedy decoding, which never launches it.

Here are the buffers and the launch. ``sampler_kernel`` is the kernel, of ``sampler_logits`` (penalties, biases, bans),
``sampler_search`` (where top-k and top-p end), ``sampler_draw`` (the token), ``sampler_weights`` (the arithmetic) and
``sampler_row`` (a row and its programs).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton

from llama_engine.kernels.common import launch_options
from llama_engine.kernels.sampler_kernel import sampler_kernel
from llama_engine.sampling import (
    MAX_BIAS,
    MAX_PHRASE_TOKENS,
    RECENT,
    RECORD,
    SamplingParams,
    count_tokens,
    recent_tokens,
)

CANDIDATES = 8192  # what a program's registers hold
WARPS = 16
PARTS = 8  # tokens that a thread has under way
WORDS = RECORD.itemsize // 4
MAX_SPLIT = 32
SPLITS: int | None = None  # programs a row, if not what programs_per_row says
BOARD = 8 + 2 * 8 * MAX_SPLIT  # int64 a row: arrivals, candidates, 6 unused, then 8 a program for even and odd meetings


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
    ``[slots + 1, MAX_BIAS]``; for bad words of several tokens ``phrase_ids`` int32 ``[slots + 1, MAX_PHRASE_TOKENS]``,
    ``phrase_ends`` int32 with half the columns, and ``recent`` int32 ``[slots + 1, RECENT]`` as
    :func:`llama_engine.sampling.recent_tokens`.
    """

    def __init__(self, slots: int, max_rows: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.records = zeros(slots + 1, WORDS)
        self.counts = zeros(slots + 1, vocab_size, dtype=torch.int16)
        self.bias_ids = zeros(slots + 1, MAX_BIAS)
        self.biases = zeros(slots + 1, MAX_BIAS, dtype=torch.float32)
        self.phrase_ids = zeros(slots + 1, MAX_PHRASE_TOKENS)
        self.phrase_ends = zeros(slots + 1, MAX_PHRASE_TOKENS // 2)
        self.recent = zeros(slots + 1, RECENT)
        self._boards = zeros(max_rows, BOARD, dtype=torch.int64)
        self._ticket = zeros(1)
        self._candidates = zeros(max_rows, CANDIDATES, dtype=torch.float32)

    def updates(
        self, slot: int, params: SamplingParams, prompt: Sequence[int] | None, output: Sequence[int] = ()
    ) -> list[tuple[torch.Tensor, np.ndarray]]:
        """What binding ``slot`` writes, and where to the front of. The history matters to penalties and bad words of
        several tokens alone; with ``prompt`` None it stays what it has become."""
        writes = [(self.records[slot], params.record.view(np.int32))]
        if params.penalized and prompt is not None:
            writes.append((self.counts[slot], count_tokens(prompt, output, self.vocab_size)))
        if params.biases:
            writes.append((self.bias_ids[slot], np.array(list(params.biases), np.int32)))
            writes.append((self.biases[slot], np.array(list(params.biases.values()), np.float32)))
        if params.phrases:
            writes += zip((self.phrase_ids[slot], self.phrase_ends[slot]), params.phrase_table)
        if params.phrases and prompt is not None:
            writes.append((self.recent[slot], recent_tokens(prompt, output)))
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

        ``logits`` float32 ``[rows, vocab]``, overwritten where penalized, biased or banned; ``sampled`` int32
        ``[rows]`` holds each row's greedy token (:func:`llama_engine.kernels.greedy.greedy`, which ran before) and
        receives the drawn one, or -1 for a row without a finite largest logit; so does ``last_token[slots[r]]`` int32,
        0 for such a row. ``position[slots[r]]`` int32 is where the new token will stand: as ``greedy`` leaves it.
        """
        chunks = triton.cdiv(self.vocab_size, PARTS * 32 * WARPS)
        split = programs_per_row(num_rows, chunks, logits.device)
        sampler_kernel[(num_rows * split,)](
            logits,
            sampled,
            slots,
            last_token,
            position,
            self.records,
            self.counts,
            self.bias_ids,
            self.biases,
            self.phrase_ids,
            self.phrase_ends,
            self.recent,
            self._candidates,
            self._boards,
            self._ticket,
            self.counts.stride(0),
            self.vocab_size,
            WORDS=WORDS,
            MAX_BIAS=MAX_BIAS,
            MAX_PHRASE_TOKENS=MAX_PHRASE_TOKENS,
            RECENT=RECENT,
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
