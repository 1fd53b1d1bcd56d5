"""When a measurement may be believed. Every threshold has a name and a reason; a broken one marks the part INVALID.

:func:`judge` reads a result's ``samples``, ``workload``, ``telemetry`` and ``checks``, and those of each level, and of
its ``environment`` the GPU's power limits.
``checks`` holds what a benchmark counted: ``failed_requests``, ``lost_answers``, ``duplicated_answers`` and
``wrong_answers`` of a failover and its ``moved_requests``, ``clock_backwards``, ``prefix_cache_hit_tokens``,
``distinct_outputs`` of the same prompts, ``client_lag_p99_ms``, ``responses_per_s`` with ``null_responses_per_s``, and
for closed-loop load ``requests_per_s`` with ``mean_latency_s``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_engine.measure.stats import summary

MIN_TIMED_RUNS = 5  # below this a median is one lucky run, and a bootstrap interval has nothing to resample
MAX_SPREAD = 0.20  # of the median; a wider middle half is noise that a ratio's interval carries, so only a caution
MAX_THROTTLED_SHARE = 0.05  # a few samples happen at start; more than this slows the median
MAX_CLOCK_DRIFT = 0.05  # clocks that moved further are two speeds, and a median over both is neither
MAX_CLIENT_LAG_MS = 5.0  # a client that wakes later than this after its due time measures itself
MAX_LITTLE_GAP = 0.10  # L = X * R holds for any stable system; ramps of a finite run explain up to a tenth
MAX_FAILED_REQUESTS = 0  # failed requests are often the slow ones: leaving them out flatters
MAX_PREFIX_CACHE_HIT_TOKENS = 0  # unless asked for: a cached prompt is no prefill, TTFT would measure a lookup
MAX_DISTINCT_OUTPUTS = 1  # an engine whose sums do not depend on their order repeats itself, or something is wrong
MIN_NULL_HEADROOM = 1.25  # a client that takes hardly more from a null model than from the engine measures itself
MIN_ACCURACY_TOKENS = 20_000  # of text behind an accuracy gate; below this the perplexity of a window decides
SLOWDOWNS = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake")  # no card's normal state
DEFAULT_POWER_LIMIT_W = {"NVIDIA H100 80GB HBM3": 700.0}  # by data sheet, for results made before it was recorded


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """``{"status": "VALID"|"INVALID", "reasons": [...], "cautions": [...]}`` for a result.

    Each of its levels gets such a verdict of its own under ``validity``. A bad level leaves the rest of the result
    standing; a result that holds nothing but bad levels is INVALID.
    """
    workload = result.get("workload", {})
    repeats = result.get("backend") == "native"  # cuBLAS, under the baseline, does not promise to
    reasons = list(_reasons(result, workload, needs_runs="latency_s" in result.get("samples", {}), repeats=repeats))
    gpu = result.get("environment", {}).get("gpu") or {}
    clocks, cautions = _clocks(result, gpu)
    reasons += clocks
    levels = result.get("levels", [])
    for level in levels:
        load = workload | level.get("workload", {}) | {k: level[k] for k in ("concurrency",) if k in level}
        clocks, normal = _clocks(level, gpu)
        found = [*_reasons(level, load, needs_runs=False, repeats=repeats), *clocks]
        level["validity"] = _verdict(found, normal)
    if levels and not result.get("samples") and all(level["validity"]["reasons"] for level in levels):
        names = [f"concurrency {x['concurrency']}" if "concurrency" in x else f"rate {x.get('rate')}" for x in levels]
        reasons += [f"{name}: {why}" for name, x in zip(names, levels) for why in x["validity"]["reasons"]]
    latencies = result.get("samples", {}).get("latency_s", [])
    spread = summary(latencies)["spread"] if len(latencies) > 1 else 0
    noisy = f"latency spread (p75 - p25) / p50 is {spread:.0%}, above {MAX_SPREAD:.0%}: trust intervals, not medians"
    return _verdict(reasons, cautions + [noisy] * (spread > MAX_SPREAD))


def _verdict(reasons: list[str], cautions: list[str]) -> dict[str, Any]:
    return {"status": "INVALID" if reasons else "VALID", "reasons": reasons, "cautions": cautions}


def _clocks(part: dict[str, Any], gpu: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(reasons, cautions) of a part's GPU clocks. A card at its own default power limit is in its normal state: a
    caution with the clocks it ran at. Slow-downs, another limit that it met, and clocks that drift are reasons."""
    telemetry = part.get("telemetry") or {}
    shares, clock = telemetry.get("throttle_share") or {}, telemetry.get("gpu_sm_clock_mhz")
    reasons = [
        f"GPU clocks were throttled ({name}) in {shares[name]:.0%} of samples"
        for name in SLOWDOWNS
        if shares.get(name, 0) > MAX_THROTTLED_SHARE
    ]
    if clock and (drift := clock.get("drift", (clock["max"] - clock["min"]) / clock["mean"])) > MAX_CLOCK_DRIFT:
        reasons.append(f"GPU clocks drifted by {drift:.0%} within the run, above {MAX_CLOCK_DRIFT:.0%}")
    if (capped := shares.get("sw_power_cap", 0)) <= MAX_THROTTLED_SHARE:
        return reasons, []
    limit = gpu.get("power_limit_w")
    default = gpu.get("default_power_limit_w") or DEFAULT_POWER_LIMIT_W.get(gpu.get("name", ""))
    if not limit or not default or abs(limit - default) > 1:
        limits = f"at a limit of {_watts(limit)}, the card's default is {_watts(default)}"
        return [*reasons, f"GPU clocks were throttled (sw_power_cap) in {capped:.0%} of samples {limits}"], []
    most = f" of {gpu['max_sm_clock_mhz']:,}" if gpu.get("max_sm_clock_mhz") else ""
    mean = f"mean SM clock {clock['mean']:,.0f}{most} MHz" if clock else "no clocks read"
    return reasons, [f"at the card's default power limit of {_watts(limit)} in {capped:.0%} of samples: {mean}"]


def _watts(limit: float | None) -> str:
    return f"{limit:,.0f} W" if limit else "unknown"


def _reasons(part: dict[str, Any], workload: dict[str, Any], *, needs_runs: bool, repeats: bool) -> Iterator[str]:
    samples, checks, telemetry = (part.get(key) or {} for key in ("samples", "checks", "telemetry"))
    latencies = samples.get("latency_s", [])
    if needs_runs and len(latencies) < MIN_TIMED_RUNS:
        yield f"{len(latencies)} timed runs, at least {MIN_TIMED_RUNS} are needed"
    asked = workload.get("output_tokens")
    wrong = [count for count in samples.get("output_tokens", []) if count != asked]
    if asked and wrong:
        yield f"{len(wrong)} outputs are not {asked} tokens long (such as {wrong[0]})"
    if (failed := checks.get("failed_requests", 0)) > MAX_FAILED_REQUESTS:
        most = max((part.get("failures") or {}).items(), key=lambda item: item[1], default=None)
        yield f"{failed} requests failed" + (f", most with {most[0]!r}" if most else "")
    for what in ("lost_answers", "duplicated_answers", "wrong_answers"):
        if count := checks.get(what, 0):
            yield f"{count} {what.replace('_', ' ')}"
    if checks.get("moved_requests") == 0:
        yield "the replica that was killed had no request: nothing was tried"
    if (rounds := checks.get("timed_rounds", MIN_TIMED_RUNS)) < MIN_TIMED_RUNS:
        yield f"{rounds} timed rounds, at least {MIN_TIMED_RUNS} are needed"
    if (early := checks.get("ended_early", 0)) and not workload.get("stop_at_eos"):
        yield f"{early} answers ended before the length asked for, which the server may not be made to ignore"
    hits = 0 if workload.get("prefix_cache") else checks.get("prefix_cache_hit_tokens", 0)
    if hits > MAX_PREFIX_CACHE_HIT_TOKENS:
        yield f"{hits} prompt tokens came from a prefix cache, which was not asked for"
    if repeats and (outputs := checks.get("distinct_outputs", 1)) > MAX_DISTINCT_OUTPUTS:
        yield f"greedy runs of the same prompts gave {outputs} different outputs"
    if checks.get("clock_backwards", 0):
        yield f"the clock went backwards {checks['clock_backwards']} times"
    if (lag := checks.get("client_lag_p99_ms")) is not None and lag > MAX_CLIENT_LAG_MS:
        yield f"the client lagged {lag:.1f} ms at p99, above {MAX_CLIENT_LAG_MS:g} ms"
    if checks.get("requests_per_s") and checks.get("mean_latency_s") and workload.get("concurrency"):
        turn = checks["mean_latency_s"] + checks.get("mean_think_s", 0.0)  # a user who thinks is not in flight
        gap = little_gap(workload["concurrency"], checks["requests_per_s"], turn)
        if gap > MAX_LITTLE_GAP:
            yield f"Little's law is off by {gap:.0%}, above {MAX_LITTLE_GAP:.0%}: the load was not the one named"
    if null := checks.get("null_responses_per_s"):
        headroom = null / checks.get("responses_per_s", 1e-9)
        if headroom < MIN_NULL_HEADROOM:
            yield f"a null model answers only {headroom:.2f} times as often, below {MIN_NULL_HEADROOM}"
    if telemetry.get("other_processes"):
        yield f"{telemetry['other_processes']} other processes used the GPU"


def little_gap(concurrency: float, requests_per_s: float, mean_latency_s: float) -> float:
    """|X R - L| / L (Little 1961): throughput times mean latency against the requests kept in flight."""
    return abs(requests_per_s * mean_latency_s - concurrency) / concurrency


def unapplied(part: dict[str, Any]) -> Iterator[str]:
    """The rules for which a result or level holds nothing to judge by."""
    checks, telemetry = part.get("checks") or {}, part.get("telemetry") or {}
    little = "rate" in part or ("concurrency" in part and "requests_per_s" in checks)  # open loops have no such law
    fields = {
        "client ceiling": checks.get("null_responses_per_s"),
        "client lag": checks.get("client_lag_p99_ms"),
        "Little's law": little or None,
        "prefix-cache hits": checks.get("prefix_cache_hit_tokens"),
        "output length": part.get("workload", {}).get("output_tokens"),
        "answers that change": checks.get("distinct_outputs"),
        "throttling": telemetry.get("throttle_share"),
        "clock drift": telemetry.get("gpu_sm_clock_mhz"),
        "other processes on the GPU": telemetry.get("other_processes"),
    }
    yield from (name for name, value in fields.items() if value is None)
