"""Sizes that CUDA graphs are captured for: a step runs in the smallest that holds it."""

from __future__ import annotations

from collections.abc import Sequence

from llama_engine.config import EngineConfig

DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Tokens of a prefill graph; more run eagerly, because from about here on they compute longer than they launch.
PREFILL_BUCKETS = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
PREFILL_CHUNKS = (1, 8, 64)
# A step of few prefill tokens beside decodes is one pass, which reads the weights once: rows of decodes, then up to 64
# or one or two times max_prefill_tokens rows of at most so many chunks.
MIXED_DECODES = (8, 16, 32, 64, 128, 256, 512)
MIXED_PREFILL, MIXED_CHUNKS = 64, 8
# Layers in the first of the two graphs of a prefill: few, so that the device starts while the host launches the rest.
FIRST_LAYERS = 4


def bucket_of(n: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds ``n``, or None."""
    return next((bucket for bucket in buckets if n <= bucket), None)


def mixed(engine: EngineConfig, rows: int) -> list[tuple[int, int]]:
    """(rows of decodes, rows of prefill) of the passes that do both, at most ``rows`` in all."""
    most = engine.max_prefill_tokens
    return [
        (decodes, tokens)
        for decodes in [*(b for b in MIXED_DECODES if b < engine.max_batch_size), engine.max_batch_size]
        for tokens in sorted({min(MIXED_PREFILL, most), most, 2 * most})
        if decodes + tokens <= rows
    ]
