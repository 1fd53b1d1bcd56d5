"""Is it still the same model? The engine, through its own kernels and paged cache, against a 16-bit reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from llama_engine.engine.engine import Engine
from llama_engine.engine.executor import Executor
from llama_engine.engine.step import Chunk, Step
from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.stats import summary
from llama_engine.measure.validity import MIN_ACCURACY_TOKENS
from llama_engine.sampling import SamplingParams

MAX_PERPLEXITY_RATIO = 1.01  # one percent: below what changing the evaluation text by a paragraph does
MAX_KL_MEAN = 0.01  # nat; at this size a reader needs hundreds of tokens to tell the two models apart
MAX_LOGIT_ERROR_RMS = 0.01  # of the logits' RMS: rounding, not a wrong kernel, which is off by the logits themselves
CHUNK_TOKENS = 256  # bounds the float32 logits in memory: 256 x 128,256 x 4 B = 131 MB

Logits = Callable[[list[int]], torch.Tensor]  # ids -> float32 [len(ids), vocab]


def _slot_zero(engine: Engine, tokens: int) -> Executor:
    """The executor of an idle engine, its slot 0 greedy and with the first blocks for so many tokens."""
    engine.executor.bind(0, SamplingParams())
    engine.executor.set_block_table(0, range(1, 1 + -(-tokens // engine.config.tokens_per_block)))
    return engine.executor


def engine_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """float32 ``[len(ids), vocab]`` from the engine's executor: chunked prefill into slot 0 of an idle engine."""
    executor = _slot_zero(engine, len(ids))
    size = min(CHUNK_TOKENS, engine.config.max_num_tokens)
    parts = [
        executor.submit(Step((Chunk(0, start, ids[start : start + size]),), logits="all")).logits().float().clone()
        for start in range(0, len(ids), size)
    ]
    return torch.cat(parts)


def served_error(reference: Logits, engine: Engine, prompt: list[int], new_tokens: int) -> float:
    """The largest RMS error of a row of logits, over the row's RMS, where the engine serves ``prompt`` as it serves
    requests: the prompt as one chunk, then one greedy token a step, in whatever graphs and kernels that takes.

    NaN when a token is not the one its logits name.
    """
    executor = _slot_zero(engine, len(prompt) + new_tokens)
    chunks = [Chunk(0, 0, prompt), *(Chunk(0, len(prompt) + i) for i in range(new_tokens - 1))]
    handles = [executor.submit(Step((chunk,), logits="last")) for chunk in chunks]
    tokens = [handle.tokens()[0] for handle in handles]
    got = torch.cat([handle.logits().float() for handle in handles])
    if got.argmax(-1).tolist() != tokens:
        return math.nan
    expected = reference([*prompt, *tokens[:-1]])[len(prompt) - 1 :].float()
    error = (expected - got.to(expected.device)).square().mean(-1) / expected.square().mean(-1)
    return float(error.max()) ** 0.5


def score(reference: torch.Tensor, engine: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each token: logits ``[n, vocab]`` of both models, row i predicts ``target[i]``. Float64 ``[n]`` each.

    KL is sum p (ln p - ln q) in nat, p the 16-bit model and q the engine.
    """
    wide, other = reference.float(), engine.float()
    p, q = F.log_softmax(wide, dim=-1), F.log_softmax(other, dim=-1)
    figures = {
        "nll_baseline": F.nll_loss(p, target, reduction="none"),
        "nll_engine": F.nll_loss(q, target, reduction="none"),
        "kl": (p.exp() * (p - q)).sum(-1, dtype=torch.float64),
        "agree": wide.argmax(-1) == other.argmax(-1),
        "error_square": (wide - other).square().sum(-1),
        "reference_square": wide.square().sum(-1),
        "error_max": (wide - other).abs().amax(-1),
        "reference_max": wide.abs().amax(-1),
    }
    return {name: values.double().cpu() for name, values in figures.items()}


def compare_logits(
    reference: Logits, engine: Logits, windows: Iterable[list[int]], *, synthetic: bool
) -> dict[str, float]:
    """Teacher-forced comparison over independent windows of ids; the figures of a result.

    Logit errors alone for synthetic weights, whose perplexity means nothing.
    """
    parts = []
    for ids in windows:
        expected, got = reference(ids), engine(ids)
        target = torch.tensor(ids[1:], device=expected.device)
        rows = zip(*(x.split(CHUNK_TOKENS) for x in (expected[:-1], got[:-1].to(expected.device), target)))
        parts += [score(*chunk) for chunk in rows]
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tokens, mean = len(scores["kl"]), {name: float(values.mean()) for name, values in scores.items()}
    top = {name: float(values.max()) for name, values in scores.items()}
    if synthetic:
        return {
            "tokens": tokens,
            "logit_error_rms": (mean["error_square"] / mean["reference_square"]) ** 0.5,
            "logit_error_max": top["error_max"] / top["reference_max"],
        }
    baseline, quantized = math.exp(mean["nll_baseline"]), math.exp(mean["nll_engine"])
    return {
        "tokens": tokens,
        "perplexity_baseline": baseline,
        "perplexity_engine": quantized,
        "perplexity_ratio": quantized / baseline,
        "kl_mean": mean["kl"],
        "kl_max": top["kl"],
        "top1_agreement": mean["agree"],
    }


def greedy_agreement(reference: Sequence[GenerationRun], engine: Sequence[GenerationRun]) -> dict[str, Any]:
    """How many greedy tokens agree before the first difference, over prompts. Sensitive to ties: shown, not gated."""
    pairs = (zip(a.token_ids, b.token_ids) for a, b in zip(reference, engine))
    lengths = [len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pair))) for pair in pairs]
    return summary(lengths) | {"of": max(len(run.token_ids) for run in reference), "lengths": lengths}


def gate(figures: dict[str, Any], *, full: bool = True) -> dict[str, Any]:
    """``{"status": "PASSED"|"FAILED", "reasons": [...]}``; a figure that is missing or NaN fails."""
    synthetic = "logit_error_rms" in figures
    limits = {"perplexity_ratio": MAX_PERPLEXITY_RATIO, "kl_mean": MAX_KL_MEAN}
    if synthetic:
        limits = {"logit_error_rms": MAX_LOGIT_ERROR_RMS, "served_error_rms": MAX_LOGIT_ERROR_RMS}
    found = {key: figures.get(key, math.nan) for key in limits}
    reasons = [f"{key} {found[key]:.5f} is above {limit}" for key, limit in limits.items() if not found[key] <= limit]
    if full and not synthetic and figures["tokens"] < MIN_ACCURACY_TOKENS:
        reasons.append(f"{figures['tokens']:,} tokens scored, at least {MIN_ACCURACY_TOKENS:,} are needed")
    return {"status": "FAILED" if reasons else "PASSED", "reasons": reasons, "limits": limits, "quick": not full}
