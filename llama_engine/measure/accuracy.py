"""Is it still the same model? The engine, through its own kernels and paged cache, against a 16-bit reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llama_engine.engine import Engine
from llama_engine.executor import Chunk, Step
from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.stats import summary
from llama_engine.sampling import SamplingParams

MAX_PERPLEXITY_RATIO = 1.01  # one percent: below what changing the evaluation text by a paragraph does
MAX_KL_MEAN = 0.01  # nat; at this size a reader needs hundreds of tokens to tell the two models apart
MAX_LOGIT_ERROR_RMS = 0.01  # of the logits' RMS: rounding, not a wrong kernel, which is off by the logits themselves
MIN_TOKENS = 20_000  # of text; below this the perplexity of a window decides
CHUNK_TOKENS = 256  # bounds the float32 logits in memory: 256 x 128,256 x 4 B = 131 MB

Logits = Callable[[list[int]], torch.Tensor]  # ids -> float32 [len(ids), vocab]


def engine_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """float32 ``[len(ids), vocab]`` from the engine's executor: chunked prefill into slot 0 of an idle engine."""
    executor, config = engine.executor, engine.config
    executor.bind(0, SamplingParams())
    executor.set_block_table(0, range(1, 1 + -(-len(ids) // config.tokens_per_block)))
    size = min(CHUNK_TOKENS, config.max_num_tokens)
    parts = [
        executor.submit(Step((Chunk(0, start, ids[start : start + size]),), logits="all")).logits().float().clone()
        for start in range(0, len(ids), size)
    ]
    return torch.cat(parts)


@dataclass
class Comparison:
    """Running sums over scored tokens. ``reference`` is p, the 16-bit model; ``engine`` is q."""

    tokens: int = 0
    nll_reference: float = 0.0
    nll_engine: float = 0.0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    agree: int = 0
    error_square: float = 0.0
    reference_square: float = 0.0
    error_max: float = 0.0
    reference_max: float = 0.0

    def add(self, reference: torch.Tensor, engine: torch.Tensor, ids: Sequence[int]) -> None:
        """Score one window: logits ``[n, vocab]`` of both, row i predicts ``ids[i + 1]``. KL is sum p (ln p - ln q)."""
        target = torch.tensor(ids[1:], device=reference.device)
        for start in range(0, len(target), CHUNK_TOKENS):
            rows = slice(start, min(start + CHUNK_TOKENS, len(target)))
            wide, other = reference[rows].float(), engine[rows].float()
            p, q = F.log_softmax(wide, dim=-1), F.log_softmax(other, dim=-1)
            picked = target[rows, None]
            self.nll_reference -= float(p.gather(1, picked).sum(dtype=torch.float64))
            self.nll_engine -= float(q.gather(1, picked).sum(dtype=torch.float64))
            kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
            self.kl_sum += float(kl.sum())
            self.kl_max = max(self.kl_max, float(kl.max()))
            self.agree += int((wide.argmax(-1) == other.argmax(-1)).sum())
            error = wide - other
            self.error_square += float(error.square().sum())
            self.reference_square += float(wide.square().sum())
            self.error_max = max(self.error_max, float(error.abs().max()))
            self.reference_max = max(self.reference_max, float(wide.abs().max()))
        self.tokens += len(target)

    def summary(self, *, synthetic: bool) -> dict[str, Any]:
        """Figures for a result; logit errors alone for synthetic weights, whose perplexity means nothing."""
        if synthetic:
            return {
                "tokens": self.tokens,
                "logit_error_rms": (self.error_square / self.reference_square) ** 0.5,
                "logit_error_max": self.error_max / self.reference_max,
            }
        baseline, engine = (float(torch.tensor(x / self.tokens).exp()) for x in (self.nll_reference, self.nll_engine))
        return {
            "tokens": self.tokens,
            "perplexity_baseline": baseline,
            "perplexity_engine": engine,
            "perplexity_ratio": engine / baseline,
            "kl_mean": self.kl_sum / self.tokens,
            "kl_max": self.kl_max,
            "top1_agreement": self.agree / self.tokens,
        }


def compare_logits(
    reference: Logits, engine: Logits, windows: Sequence[list[int]], advance: Callable[[], None] = lambda: None
) -> Comparison:
    """Teacher-forced comparison over independent windows of token ids."""
    result = Comparison()
    for ids in windows:
        expected = reference(ids)
        result.add(expected, engine(ids).to(expected.device), ids)
        advance()
    return result


def greedy_agreement(reference: Sequence[GenerationRun], engine: Sequence[GenerationRun]) -> dict[str, Any]:
    """How many greedy tokens agree before the first difference, over prompts. Sensitive to ties: shown, not gated."""
    lengths = []
    for a, b in zip(reference, engine):
        same = [x == y for x, y in zip(a.token_ids, b.token_ids)]
        lengths.append(same.index(False) if False in same else len(same))
    return summary(lengths) | {"of": max(len(run.token_ids) for run in reference), "lengths": lengths}


def gate(figures: dict[str, Any], *, full: bool = True) -> dict[str, Any]:
    """``{"status": "PASSED"|"FAILED", "reasons": [...]}``; a figure that is missing or NaN fails."""
    limits = {"perplexity_ratio": MAX_PERPLEXITY_RATIO, "kl_mean": MAX_KL_MEAN}
    if "logit_error_rms" in figures:
        limits = {"logit_error_rms": MAX_LOGIT_ERROR_RMS}
    reasons = [
        f"{key} {figures.get(key, float('nan')):.5f} is above {limit}"
        for key, limit in limits.items()
        if not figures.get(key, float("nan")) <= limit
    ]
    if full and "logit_error_rms" not in figures and figures["tokens"] < MIN_TOKENS:
        reasons.append(f"{figures['tokens']:,} tokens scored, at least {MIN_TOKENS:,} are needed")
    return {
        "status": "FAILED" if reasons else "PASSED",
        "reasons": reasons,
        "limits": limits,
        "quick": not full,
    }
