"""Latency limits that requests must meet, by name or by number, and the search for the highest load that meets them."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_engine.errors import InputError
from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.stats import wilson

METRICS: dict[str, Callable[[GenerationRun], float]] = {
    "ttft_ms": lambda run: run.ttft_s * 1e3,
    "tpot_ms": lambda run: run.tpot_s * 1e3,
    "latency_ms": lambda run: run.latency_s * 1e3,
}
ATTAINMENT = 0.9  # share of requests that must meet the limits, where nobody says otherwise
# MLPerf Inference's limits on the 99th percentiles of Llama 3.1 8B
NAMED = {
    "mlperf-server": ({"ttft_ms": 2000.0, "tpot_ms": 100.0}, 0.99),
    "mlperf-interactive": ({"ttft_ms": 500.0, "tpot_ms": 30.0}, 0.99),
}
PRECISION = 0.05  # of the load: where bisection ends
SATURATED = 1.05  # times the tokens/s of half the load; a sweep goes on while more is gained
Verdict = Literal["met", "missed", "undecided"]


@dataclass(frozen=True)
class Limits:
    """``attainment`` of all requests must stay within every limit; a failed request stays within none."""

    limits: dict[str, float]
    attainment: float = ATTAINMENT
    name: str = ""

    @classmethod
    def parse(cls, items: Sequence[str], attainment: float | None = None) -> Limits | None:
        """``["ttft_ms:200", "tpot_ms:30"]`` or ``["mlperf-server"]``; None of nothing. Raises :class:`InputError`."""
        if attainment is not None and not 0 < attainment < 1:
            raise InputError(f"--attainment must lie between 0 and 1, got {attainment:g}")
        if len(items) == 1 and items[0] in NAMED:
            limits, share = NAMED[items[0]]
            return cls(limits, attainment or share, items[0])
        limits = {}
        for item in items:
            found = re.fullmatch(rf"({'|'.join(METRICS)}):(\d+\.?\d*)", item)
            if not found or not 0 < float(found[2]) < math.inf:
                forms = ", ".join(f"{key}:MS" for key in METRICS)
                raise InputError(f"--slo takes {forms}, or one of {', '.join(NAMED)} alone, got {item!r}")
            limits[found[1]] = float(found[2])
        return cls(limits, attainment or ATTAINMENT) if limits else None

    def met(self, run: GenerationRun) -> bool:
        return all(METRICS[key](run) <= limit for key, limit in self.limits.items())

    def judge(self, runs: Sequence[GenerationRun], failed: int, wall_s: float) -> dict[str, Any]:
        """``summary.goodput`` of a load."""
        met, total = sum(map(self.met, runs)), len(runs) + failed
        found = {"slo": self.limits, "requests_per_s": met / wall_s, "share": met / total, "ci95": wilson(met, total)}
        return found | {"attainment": self.attainment, "requests": total} | ({"name": self.name} if self.name else {})

    def verdict(self, low: float, high: float) -> Verdict:
        """What the interval of the share says: "met" only when all of it reaches the attainment."""
        return "met" if low >= self.attainment else "missed" if high < self.attainment else "undecided"


def least_requests(attainment: float) -> int:
    """How many requests, all of them within the limits, show with 95 % confidence that ``attainment`` is met."""
    count = 1
    while wilson(count, count)[0] < attainment:
        count += 1
    return count


Try = Callable[[float, int], Awaitable[dict[str, Any]]]  # load, requests -> the level measured


@dataclass
class Search:
    """Bisection over the load (``by`` rate or concurrency) between one that meets the limits and one that does not.

    A trial sends as many requests as can show that the limits are met. While its interval lies on both sides of the
    attainment it is repeated with twice as many, up to ``most`` requests; then the share itself decides for the
    search, and the step is recorded as undecided.
    """

    limits: Limits
    by: str
    start: float
    ceiling: float
    most: int = 4000
    precision: float = PRECISION

    async def run(self, attempt: Try) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The ``search`` of a result, and the levels that its steps name."""
        levels: list[dict[str, Any]] = []
        steps: list[dict[str, Any]] = []
        met, missed = 0.0, math.inf
        while (value := self._next(met, missed)) is not None:
            if await self._holds(value, attempt, levels, steps):
                met = value
            else:
                missed = value
        best = max((s for s in steps if s["value"] == met), key=lambda s: s["level"], default=None)
        found: dict[str, Any] = {"slo": self.limits.limits, "attainment": self.limits.attainment, "by": self.by}
        found |= {"name": self.limits.name} if self.limits.name else {}
        found |= {"highest_met": met or None, "lowest_missed": missed if missed < math.inf else None}
        if best:
            found["goodput"] = levels[best["level"]]["summary"]["goodput"]
        return found | {"steps": steps, "precision": self.precision}, levels

    def _next(self, met: float, missed: float) -> float | None:
        """The load to try: double until one misses, then halve the interval; None when it is narrow enough."""
        if missed == math.inf:
            value = min(self.ceiling, 2 * met) if met else self.start
            return None if met >= self.ceiling else value
        value = math.sqrt(met * missed) if met else missed / 2
        if self.by == "concurrency":
            value = round(value) if met else missed // 2
            return float(value) if met < value < missed and missed - met > max(1, self.precision * missed) else None
        small = self.start / 64  # a target that misses even this is not worth a number
        return None if (missed - met) <= self.precision * missed or value < small else value

    async def _holds(
        self, value: float, attempt: Try, levels: list[dict[str, Any]], steps: list[dict[str, Any]]
    ) -> bool:
        requests = min(self.most, 2 * least_requests(self.limits.attainment))
        while True:
            part = await attempt(value, requests)
            levels.append(part)
            goodput = part["summary"].get("goodput") or {"share": 0.0, "ci95": [0.0, 0.0]}
            verdict = self.limits.verdict(*goodput["ci95"])
            step = {"value": value, "level": len(levels) - 1, "requests": requests, "verdict": verdict}
            steps.append(step | {key: goodput[key] for key in ("share", "ci95")})
            if verdict != "undecided" or requests >= self.most:
                return verdict == "met" or (verdict == "undecided" and goodput["share"] >= self.limits.attainment)
            requests = min(self.most, 2 * requests)


async def sweep(attempt: Try, start: int, ceiling: int, requests_a_user: int) -> list[dict[str, Any]]:
    """The levels of concurrency from ``start``, doubled until tokens/s grow by less than :data:`SATURATED`."""
    levels: list[dict[str, Any]] = []
    last, value = 0.0, start
    while value <= ceiling:
        levels.append(await attempt(value, requests_a_user * value))
        rate = levels[-1]["summary"].get("output_tokens_per_s", {"p50": 0.0})["p50"]
        if rate < SATURATED * last:
            break
        last, value = rate, 2 * value
    return levels
