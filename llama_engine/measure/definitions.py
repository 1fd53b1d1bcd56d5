"""Our recorded samples under other tools' definitions of the same words (docs/METRICS.md says where they differ)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_engine.measure.stats import percentile

Samples = dict[str, Sequence[Any]]
Metric = tuple[str, str, Callable[[Samples], list[float]]]  # name, formula, value of each request (or gap)


def _ttft(s: Samples) -> list[float]:
    return list(s["ttft_ms"])


def _latency(s: Samples) -> list[float]:
    return [seconds * 1e3 for seconds in s["latency_s"]]


def _after_first(s: Samples) -> list[float]:
    """(latency - TTFT) / (tokens - 1) in ms: the same number as our TPOT, from other fields."""
    rows = zip(_latency(s), s["ttft_ms"], s["output_tokens"])
    return [(latency - first) / max(1, count - 1) for latency, first, count in rows]


def _with_first(s: Samples) -> list[float]:
    return [latency / count for latency, count in zip(_latency(s), s["output_tokens"])]


def _gaps(s: Samples) -> list[float]:
    return list(s.get("itl_ms", []))


def _speed(s: Samples) -> list[float]:
    return [1e3 / ms for ms in _after_first(s)]


def _request_speed(s: Samples) -> list[float]:
    return [1e3 / ms for ms in _with_first(s)]


DEFINITIONS: dict[str, tuple[Metric, ...]] = {
    "ours": (
        ("TTFT, ms", "t1 - t0, a request", _ttft),
        ("TPOT, ms", "(tN - t1) / (N - 1), a request", lambda s: list(s["tpot_ms"])),
        ("ITL, ms", "gap between tokens, pooled", _gaps),
        ("latency, ms", "tN - t0, a request", _latency),
        ("output tokens/s", "N / (tN - t0), a request", _request_speed),
    ),
    "vllm": (
        ("TTFT, ms", "first chunk - send, a request", _ttft),
        ("TPOT, ms", "(latency - TTFT) / (output tokens - 1), a request", _after_first),
        ("ITL, ms", "gap between stream chunks, pooled", _gaps),
        ("E2EL, ms", "last chunk - send, a request", _latency),
    ),
    "aiperf": (
        ("time to first token, ms", "first non-empty response - start", _ttft),
        ("inter token latency, ms", "(latency - TTFT) / (output length - 1): our TPOT", _after_first),
        ("inter chunk latency, ms", "gap between responses: our ITL", _gaps),
        ("request latency, ms", "last response - start", _latency),
        ("output token throughput per user", "1 / inter token latency", _speed),
    ),
    "guidellm": (
        ("TTFT, ms", "first token - start", _ttft),
        ("TPOT, ms", "(last token - start) / tokens: holds the TTFT, not our TPOT", _with_first),
        ("ITL, ms", "(last - first token) / (tokens - 1): our TPOT", _after_first),
        ("request latency, ms", "end - start", _latency),
    ),
    "trtllm-bench": (
        ("TTFT, ms", "first token - start", _ttft),
        ("intertoken latency, ms", "(end - first token) / (tokens - 1): our TPOT", _after_first),
        ("generation throughput, tok/s", "(tokens - 1) / (end - first token)", _speed),
        ("request latency, ms", "end - start", _latency),
    ),
}


def nearest_rank(samples: Sequence[float], q: float) -> float:
    """``sorted(samples)[int(n q / 100)]``: trtllm-bench's percentile, which never interpolates."""
    ordered = sorted(samples)
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))])


def table(tool: str, samples: Samples) -> list[tuple[str, str, dict[str, float]]]:
    """(name, formula, {mean, p50, p90, p99}) of every metric of ``tool`` that the samples allow."""
    take = nearest_rank if tool == "trtllm-bench" else percentile
    rows = []
    for name, formula, values_of in DEFINITIONS[tool]:
        if values := values_of(samples):
            figures = {"mean": float(np.mean(values))} | {f"p{q}": take(values, q) for q in (50, 90, 99)}
            rows.append((name, formula, figures))
    return rows
