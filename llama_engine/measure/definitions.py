"""Our recorded samples under other tools' definitions of the same words (docs/METRICS.md says where they differ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_engine.measure.stats import percentile

DEFINITIONS = {  # tool: (name, formula, which of quantities())
    "ours": (
        ("TTFT, ms", "t1 - t0, a request", "ttft"),
        ("TPOT, ms", "(tN - t1) / (N - 1), a request", "tpot"),
        ("ITL, ms", "gap between tokens, pooled", "gaps"),
        ("latency, ms", "tN - t0, a request", "latency"),
        ("output tokens/s", "N / (tN - t0), a request", "request_speed"),
    ),
    "vllm": (
        ("TTFT, ms", "first chunk - send, a request", "ttft"),
        ("TPOT, ms", "(latency - TTFT) / (output tokens - 1), a request", "after_first"),
        ("ITL, ms", "gap between stream chunks, pooled", "gaps"),
        ("E2EL, ms", "last chunk - send, a request", "latency"),
    ),
    "aiperf": (
        ("time to first token, ms", "first non-empty response - start", "ttft"),
        ("inter token latency, ms", "(latency - TTFT) / (output length - 1): our TPOT", "after_first"),
        ("inter chunk latency, ms", "gap between responses: our ITL", "gaps"),
        ("request latency, ms", "last response - start", "latency"),
        ("output token throughput per user", "1 / inter token latency", "speed"),
    ),
    "guidellm": (
        ("TTFT, ms", "first token - start", "ttft"),
        ("TPOT, ms", "(last token - start) / tokens: holds the TTFT, not our TPOT", "with_first"),
        ("ITL, ms", "(last - first token) / (tokens - 1): our TPOT", "after_first"),
        ("request latency, ms", "end - start", "latency"),
    ),
    "trtllm-bench": (
        ("TTFT, ms", "first token - start", "ttft"),
        ("intertoken latency, ms", "(end - first token) / (tokens - 1): our TPOT", "after_first"),
        ("generation throughput, tok/s", "(tokens - 1) / (end - first token)", "speed"),
        ("request latency, ms", "end - start", "latency"),
    ),
}


def quantities(samples: dict[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """Every quantity that a tool gives a name: times in ms, speeds in tokens/s; a value a request, or a gap."""
    ttft, latency, count = (np.array(samples[key]) for key in ("ttft_ms", "latency_s", "output_tokens"))
    latency = latency * 1e3
    after_first = (latency - ttft) / np.maximum(1, count - 1)  # the same number as our TPOT, from other fields
    return {
        "ttft": ttft,
        "tpot": np.array(samples["tpot_ms"]),
        "latency": latency,
        "gaps": np.array(samples.get("itl_ms", [])),
        "after_first": after_first,
        "with_first": latency / count,
        "speed": 1e3 / after_first,
        "request_speed": 1e3 * count / latency,
    }


def nearest_rank(samples: Sequence[float], q: float) -> float:
    """``sorted(samples)[int(n q / 100)]``: trtllm-bench's percentile, which never interpolates."""
    ordered = sorted(samples)
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))])


def table(tool: str, samples: dict[str, Sequence[Any]]) -> list[tuple[str, str, dict[str, float]]]:
    """(name, formula, {mean, p50, p90, p99}) of every metric of ``tool`` that the samples allow."""
    take, found = nearest_rank if tool == "trtllm-bench" else percentile, quantities(samples)
    return [
        (name, formula, {"mean": float(found[key].mean())} | {f"p{q}": take(found[key], q) for q in (50, 90, 99)})
        for name, formula, key in DEFINITIONS[tool]
        if len(found[key])
    ]
