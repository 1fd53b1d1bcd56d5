"""Percentiles, summaries and bootstrap intervals. Definitions: docs/METRICS.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

PERCENTILES = (50, 90, 95, 99)
Z95 = 1.959963984540054
RESAMPLES, SEED = 10_000, 0  # of the bootstrap: the same samples give the same interval
Verdict = Literal["faster", "slower", "inconclusive"]


def percentile(samples: Sequence[float], q: float) -> float:
    """The ``q``-th percentile (0..100), linear interpolation between order statistics (NumPy's default)."""
    return float(np.percentile(np.asarray(samples, dtype=np.float64), q, method="linear"))


def summary(samples: Sequence[float]) -> dict[str, float]:
    """``p50 p90 p95 p99 mean std min max count spread``; spread is (p75 - p25) / p50. Raises on no samples."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no samples to summarize")
    middle = percentile(values, 50)
    return {f"p{q}": percentile(values, q) for q in PERCENTILES} | {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if values.size > 1 else 0.0,
        "min": float(values.min()),
        "max": float(values.max()),
        "count": int(values.size),
        "spread": (percentile(values, 75) - percentile(values, 25)) / middle if middle else 0.0,
    }


def drift(turns: Sequence[Sequence[float]]) -> float:
    """How far the mean moved in time: (largest - smallest) mean of four successive quarters / mean of all.

    ``turns`` are the samples of each repetition of the same work. With four or more, no quarter begins within one:
    a prompt takes a GPU's clocks lower than the decode after it, which is not drift. Raises ValueError on no samples.
    """
    parts = [np.asarray(turn, dtype=np.float64) for turn in turns if len(turn)]
    whole = np.concatenate(parts)
    if len(parts) < 4:
        parts = np.array_split(whole, 4)
    else:
        parts = [np.concatenate(parts[group[0] : group[-1] + 1]) for group in np.array_split(range(len(parts)), 4)]
    quarters = [part.mean() for part in parts if part.size]
    return float((max(quarters) - min(quarters)) / whole.mean())


def interval(samples: Sequence[float], of: Literal["median", "mean"] = "median") -> tuple[float, float]:
    """95 % interval of the median, or mean, by percentile bootstrap, seeded. Raises on no samples."""
    values = np.asarray(samples, dtype=np.float64)
    drawn = values[np.random.default_rng(SEED).integers(0, values.size, (RESAMPLES, values.size))]
    low, high = np.percentile(np.median(drawn, axis=1) if of == "median" else drawn.mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def wilson(count: int, total: int) -> list[float]:
    """95 % interval of the share ``count`` / ``total`` (Wilson 1927), which holds near 0 and 1 too. Takes what was
    counted to be independent."""
    share, z2 = count / total, Z95**2 / total
    center, half = (share + z2 / 2) / (1 + z2), math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return [max(0.0, center - half), min(1.0, center + half)]


def verdict(low: float, high: float) -> Verdict:
    """What a speed-up interval says: "faster" only when all of it lies above 1."""
    return "faster" if low > 1 else "slower" if high < 1 else "inconclusive"


def bootstrap_ratio(numerator: Sequence[float], denominator: Sequence[float], *, paired: bool = True) -> dict[str, Any]:
    """``{"ratio", "ci95", "verdict"}`` of median(numerator) / median(denominator).

    Percentile bootstrap (Efron 1979), seeded. ``paired`` resamples whole A-B pairs, so drift that hits both
    neighbours of an interleaved run cancels; it needs equal lengths. Arrange the arguments so that above 1 is better.
    """
    top, bottom = (np.asarray(values, dtype=np.float64) for values in (numerator, denominator))
    if top.size == 0 or bottom.size == 0:
        raise ValueError("no samples to compare")
    if paired and top.size != bottom.size:
        raise ValueError(f"paired samples differ in number: {top.size} and {bottom.size}")
    if top.min() <= 0 or bottom.min() <= 0:
        raise ValueError("a ratio needs positive samples")
    rng = np.random.default_rng(SEED)
    first = rng.integers(0, top.size, (RESAMPLES, top.size))
    second = first if paired else rng.integers(0, bottom.size, (RESAMPLES, bottom.size))
    ratios = np.median(top[first], axis=1) / np.median(bottom[second], axis=1)
    low, high = (float(value) for value in np.percentile(ratios, (2.5, 97.5)))
    ratio = float(np.median(top) / np.median(bottom))
    return {"ratio": ratio, "ci95": [low, high], "verdict": verdict(low, high)}
